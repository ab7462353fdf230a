"""Masks by name in layers that call `attention` (docs/masks.md): the knob, whole rows, streams, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import config as config_lib
from attnlab import masks
from attnlab.mixers.base import knob
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import KeysValues, Reordered, Whole
from attnlab.ops.masks import Mask, mean_visible_keys

# Implementations of attention, whole and over a cache, that read more of a mask than an interval.
_IMPLS = ("auto", "flash", "tiles", "definition")
_DECODE_IMPLS = ("auto", "one_query", "tiles", "definition")


def mask_knob() -> Any:
    """The field `mask` of a Config, whose `__post_init__` calls `resolve_mask` first and `require_mask` last."""
    return knob(
        None,
        "node of a mask that narrows what a query sees (docs/masks.md); none: all that causality and documents allow",
        other=({"name": "power_blocks", "block": 2, "sinks": 0},),
        build=lambda tree, path: _config(tree, path),
    )


def resolve_mask(config: Any) -> None:
    """Makes `config.mask` a typed Config."""
    object.__setattr__(config, "mask", _config(config.mask, "mask"))


def require_mask(config: Any) -> None:
    """ConfigError where the mask does not go with other knobs."""
    if config.mask is None:
        return
    need, name, where = config_lib.require, config.mask.node_name, "where mask is set"
    cross, source = masks.get(name).cross, getattr(config, "source", None)
    window, qk_norm = getattr(config, "window", None), getattr(config, "qk_norm", False)
    config.mask.require_heads(config.heads, "mask")
    need(window is None, "window", window, f"none {where}")
    need(not cross or hasattr(config, "source"), "mask", name, "masks of a sequence: this layer reads no context")
    allowed = f"a context, which mask {name} is of" if cross else f"none {where}"
    need((source is not None) == cross, "source", source, allowed)
    need(qk_norm != "cosine", "qk_norm", qk_norm, f"another {where}: cosine counts the keys of an interval")
    why = masks.get(name).unserved(config.mask, causal=config.causal)
    need(cross or not why, "causal", config.causal, f"{str(not config.causal).lower()}: {why}")
    for field, impls in (("impl", _IMPLS), ("decode_impl", _DECODE_IMPLS)):
        value = getattr(config, field)
        need(value in impls, field, value, f"{', '.join(impls)} {where}")


def mean_keys(config: Any, length: int) -> float:
    """Mean number of keys that a position of a document sees, by the config's mask, or else by its window."""
    if getattr(config, "mask", None) is None:
        return mean_visible_keys(length, config.causal, getattr(config, "window", None))
    return masks.build(config.mask).span(length, causal=config.causal)


def _config(tree: Any, path: str) -> masks.MaskConfig | None:
    """The typed Config of a node; None where it is none."""
    tree = tree.text if isinstance(tree, config_lib.Override) else tree
    if tree is None or (isinstance(tree, str) and tree.lower() in ("none", "null")):
        return None
    return masks.config_from_node(tree, path)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedCache:
    """What a layer keeps of a stream, `kv`, and what its mask says of each position: int32 [B, S] arrays."""

    kv: Any
    coordinates: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """Whole rows, or the next positions of a stream, as a layer's mask has them; without a mask as they are.

    Attributes:
      seq: with the positions that encodings turn by.
      carried: what the layer itself keeps of the stream; None for whole rows.
    """

    seq: Sequence
    carried: Any
    _own: Sequence
    _builder: masks.MaskBuilder | None = None
    _coordinates: tuple[jax.Array, ...] | None = None

    def mask(self, interval: Mask, *, causal: bool) -> Mask:
        """Which keys each query sees, of those that causality and documents allow, `interval`."""
        if self._builder is None:
            return interval
        if self._coordinates is None:
            return self._builder.mask(self._own, causal=causal)
        return self._builder.rows(self._own, self._coordinates, interval)

    def ordered(self, kv: Whole) -> KeysValues:
        """Keys and values of whole rows, in the order that the mask has them in."""
        order = None if self._builder is None else self._builder.order(self._own)
        return kv if order is None else Reordered(kv, order)

    def kept(self, carried: Any) -> Any:
        """What a stream keeps after these positions."""
        return carried if self._coordinates is None else MaskedCache(carried, self._coordinates)


class Masked:
    """Beside a `HeadMixer` whose Config has a `mask_knob`: `mask`, its builder or None, and what streams keep of it."""

    def __init__(self, config: Any, **options: Any):
        super().__init__(config, **options)
        self.mask = None if config.mask is None else masks.build(config.mask)

    @property
    def stack_reads(self) -> tuple[str, ...]:
        return ("step",) if self.mask is not None and self.mask.reads_step else ()

    def require(self, seq: Sequence, *, causal: bool) -> None:
        super().require(seq, causal=causal)
        if self.mask is not None:
            self.mask.require(seq, causal=causal)

    def unknown(self, seq: Sequence, carried: Any) -> jax.Array | None:
        if self.mask is None or self.mask.cross:
            return None
        stored = () if carried is None else carried.coordinates
        keys = stored[0].shape[1] if stored else seq.positions.shape[1]
        return self.mask.lost(seq, keys, causal=self.config.causal)

    @classmethod
    def require_length(cls, config: Any, length: int) -> None:
        super().require_length(config, length)
        if config.mask is not None:
            masks.build(config.mask).require_length(length)

    @classmethod
    def sees_ahead(cls, config: Any) -> bool:
        return config.mask is not None and config.causal and masks.build(config.mask).streaming == "closed"

    @classmethod
    def cost_note(cls, config: Any) -> str:
        return super().cost_note(config) if config.mask is None else masks.get(config.mask.node_name).span_note

    def viewed(self, seq: Sequence, carried: Any, length: Callable[[Any], jax.Array]) -> View:
        """The view of these positions; `length` says how many came before of what the layer itself keeps."""
        builder = self.mask
        if builder is None or builder.cross:
            return View(seq, carried, seq)
        placed = lambda *stream: dataclasses.replace(seq, positions=builder.positions(seq, *stream))
        if carried is None:
            return View(placed(), None, seq, builder)
        first = length(carried.kv)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=1)
        stored = tuple(map(put, carried.coordinates, builder.coordinates(seq)))
        index = first + jnp.arange(seq.positions.shape[1], dtype=jnp.int32)[None]
        return View(placed(stored, index), carried.kv, seq, builder, stored)

    def beside_mask(self, carried: Any, batch: int, max_length: int) -> Any:
        """What a stream keeps at first, of what the layer itself keeps."""
        if self.mask is None or self.mask.cross:
            return carried
        blank = jnp.zeros((batch, max_length), jnp.int32)
        return MaskedCache(carried, (blank,) * self.mask.stored)
