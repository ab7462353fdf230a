"""Landmark attention: every block of tokens ends with a landmark, by which later queries find the block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.sequence import Sequence
from attnlab.ops.key_blocks import BlockPlaces, at_blocks, blocks_of
from attnlab.ops.keys_values import Cached, KVCache, empty_cache
from attnlab.ops.landmark_attention import definition, landmark_attention, retrieving_attention
from attnlab.ops.masks import Mask

_IMPLS = "blocks", "definition"
CHOICES = {
    "head": "each query head by itself, by its landmarks' logits",
    "token": "all heads of a token alike, by the largest weight that they give a landmark of those they see",
}


@dataclasses.dataclass(frozen=True)
class LandmarkConfig(GroupedConfig):
    """Knobs of landmark attention."""

    block: int = knob(
        50, "ordinary tokens of a block, l, behind which its landmark stands: positions l, 2 l + 1, ... of a document",
        other=(2,), least=1,
    )  # fmt: skip
    top_k: int | None = knob(
        None, "blocks before its own that each query head retrieves, by their landmarks; none: all", other=(1,), least=1
    )
    choice: str = knob(
        "head", f"how blocks are chosen, where top_k is set; {'; '.join(f'{k}: {v}' for k, v in CHOICES.items())}",
        other=("token",), choices=CHOICES,
    )  # fmt: skip
    impl: str = knob("blocks", "blocks, or definition (all pairs)", other=("definition",), choices=_IMPLS)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.choice == "head" or self.top_k is not None
        config_lib.require(given, "choice", self.choice, "head, the default, where top_k is none")

    @property
    def size(self) -> int:
        """Positions of a block with its landmark."""
        return self.block + 1

    @property
    def retrieval(self) -> dict[str, Any]:
        """What ops take of it."""
        return {"top_k": self.top_k, "alike": self.choice == "token"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LandmarkState:
    """All keys and values, and where the complete blocks end.

    Attributes:
      kv: the keys and values.
      last: int32 [B, N], the landmark of each.
      done: int32 [B], how many there are.
    """

    kv: KVCache
    last: jax.Array
    done: jax.Array


@register("landmark")
class Landmark(GroupedMixer):
    """Softmax attention in which a block's tokens share the weight that its landmark gets.

    With blocks of l ordinary tokens and their landmark m, a query has one softmax p over the tokens of its own block up
    to it and the landmarks of the blocks before; token j of such a block has the weight `p(m) softmax_j(q . k_j)`, that
    softmax over the block's tokens. Landmarks have no value; one that is a query sees its block without itself.

    Positions are counted from each document's start. What stands at a landmark's position is the data's to say.
    """

    Config = LandmarkConfig
    capabilities = Capabilities()
    sequence_parallel = "keys and values are gathered, queries stay where they are"
    paper = (
        "Mohtashami and Jaggi 2023, Landmark Attention: Random-Access Infinite Context Length for Transformers, "
        "arXiv:2305.16300"
    )
    extension = (
        "blocks that begin anew with each packed document; retrieved blocks keep their positions, and of equal "
        "landmarks the first is retrieved"
    )
    implementations = _IMPLS
    variants = (
        {"block": 2, "kv_heads": 2, "top_k": 2},
        {"block": 1, "kv_heads": 1, "rope_base": None, "bias": "all"},
    )

    def heads(self, x: jax.Array, seq: Sequence, carried: LandmarkState | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c, (q, k, v) = self.config, self.positioned(x, seq)
        if carried is not None:
            return self._of_stream(q, k, v, seq, carried)
        offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
        places = BlockPlaces.of(offset, c.size)
        if c.impl == "definition":
            return MixerOutput(self._all_pairs(q, k, v, seq, places))
        blocks = tuple(blocks_of(y, places, one_document=seq.segments is None) for y in (k, v))
        own, *earlier = _seen(places, 0, seq.padding)
        return MixerOutput(landmark_attention(q, (k, v), own, blocks, *earlier, **c.retrieval))

    def _of_stream(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence, carried: LandmarkState
    ) -> MixerOutput:
        """The next positions, over the cache."""
        c, (B, T, H, _), K = self.config, q.shape, k.shape[2]
        places, first = BlockPlaces.of(seq.offsets, c.size, carried.done), carried.kv.length
        kv, view, _ = carried.kv.append(k, v, seq.offsets, None)
        (at, slot), rows = places.last_positions(), jnp.arange(B)[:, None]
        last = carried.last.at[rows, slot].set(first + at, mode="drop")
        carried = LandmarkState(kv, last, places.done)
        # Own blocks begin n - 1 keys before the first position, or later.
        reach = min(T + c.size - 1, view.k.shape[1])
        begin = jnp.clip(first - (c.size - 1), 0, view.k.shape[1] - reach)
        near = (jax.lax.dynamic_slice_in_dim(y, begin, reach, axis=1) for y in (view.k, view.v))
        own, *earlier = _seen(places, first - begin, seq.padding)
        args = q, Cached(*near, view.fits).by_position(B), own
        choices = T * (1 if c.choice == "token" else H // K)
        if c.impl != "definition" and c.top_k is not None and choices * c.top_k < last.shape[1]:
            cache, options = (view.k, view.v), {"size": c.size, **c.retrieval}
            return MixerOutput(retrieving_attention(*args, cache, last, *earlier, **options), carried)
        blocks = tuple(at_blocks(y, last, c.size) for y in view.by_position(B))
        return MixerOutput(landmark_attention(*args, blocks, *earlier, **c.retrieval), carried)

    def _all_pairs(self, q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence, places: BlockPlaces) -> jax.Array:
        wide = lambda y: jnp.broadcast_to(y, q.shape[:2])
        document = wide(jnp.zeros((1, 1), jnp.int32) if seq.documents is None else seq.documents)
        if seq.padding is not None:
            document = jnp.where(seq.padding, -1, document)
        begin = jnp.arange(q.shape[1], dtype=jnp.int32) - places.offset % self.config.size
        return definition(q, k, v, document, wide(begin), wide(places.ends), **self.config.retrieval)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> LandmarkState:
        c = self.config
        last = jnp.full((batch, max(1, max_length // c.size)), c.block, jnp.int32)
        kv = empty_cache(batch, c.key_heads, self.head_dim, max_length, dtype)
        return LandmarkState(kv, last, jnp.zeros((batch,), jnp.int32))

    @classmethod
    def flops(cls, config: LandmarkConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        span = sum(seen(t, config.size, config.top_k) for t in range(length)) / length
        inner = config.heads * config.head_dim(width)
        return {
            "projections": cls.projection_flops(config, width),
            "gate": 2.0 * inner * sum(left(t, config.size, config.top_k) for t in range(length)) / length,
            "attention": 4.0 * inner * span,
        }, span


def _seen(places: BlockPlaces, first: jax.Array | int, padding: jax.Array | None) -> tuple[Mask, jax.Array, jax.Array]:
    """Which keys of its own block each position sees, of which its own is key `first` of the first; and from which
    block before, to which."""
    own, _ = places.own_and_earlier(first, padding)
    own = dataclasses.replace(own, k_end=own.k_end - places.ends)
    end = places.entry if padding is None else jnp.where(padding, 0, places.entry)
    return own, places.entry - places.block, end


def seen(t: int, size: int, top_k: int | None) -> int:
    """Keys, landmarks among them, that the query at position t of a document attends to."""
    before, within = divmod(t, size)
    own = within + (within < size - 1)
    return own + size * (before if top_k is None else min(top_k, before))


def left(t: int, size: int, top_k: int | None) -> int:
    """Landmarks that the query at position t of a document scores and does not attend to."""
    return 0 if top_k is None else max(0, t // size - top_k)
