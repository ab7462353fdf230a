"""Softmax attention of objects, biased by how their boxes lie to each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.key_blocks import by_rows
from attnlab.ops.keys_values import KVCache, empty_cache
from attnlab.ops.masks import mean_visible_keys
from attnlab.ops.position_codes import is_box, relation_code

MOST = 1024  # keys of a row: there is a bias of every pair


@dataclasses.dataclass(frozen=True)
class ObjectRelationConfig(GroupedConfig):
    """Knobs of attention that is biased by boxes."""

    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    frequencies: int = knob(4, "of the sines and cosines of each of a relation's four numbers", other=(2,), least=1)
    relation_base: float = knob(100.0, "base of these frequencies", other=(10.0,), above=1)
    chunk: int = knob(128, "rows computed together; changes only speed and memory", other=(4,), least=1)
    impl: str = knob(
        "auto", "auto (rows), rows (a chunk at a time), definition (all pairs at once)", other=("definition",),
        choices=("auto", "rows", "definition"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"{MOST}, the most keys of a row, or less"
        config_lib.require(self.chunk <= MOST, "chunk", self.chunk, allowed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelationCache:
    """Keys and values so far, and their boxes, [B, S, 4]."""

    kv: KVCache
    boxes: jax.Array


@register("object_relation")
class ObjectRelation(GroupedMixer):
    """`softmax(q_i . k_j / sqrt(d) + b_ij) v`, `b_ij = code(phi_ij) W`, a number of each head, for objects i and j.

    `phi_ij` is where the middle of j lies from that of i, in widths and heights of i, and the logarithms of j's width
    and height in those of i (`attnlab.ops.position_codes.relation_code`): moving or scaling all boxes together changes
    nothing. Boxes are those of `Sequence.boxes`; where i or j has none, as text, b_ij is 0, so that without boxes the
    layer is softmax attention. The biases of all pairs are made: rows of more than 1,024 keys are refused.
    """

    Config = ObjectRelationConfig
    capabilities = Capabilities(bidirectional=True)
    paper = "Fang et al. 2024, OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction, arXiv:2407.13335"
    extension = (
        "biases by relations of boxes are our reading of a code that reflects how objects lie to each other; the "
        "paper's own is of distances"
    )
    implementations = ("definition", "rows")
    variants = ({"kv_heads": 2, "causal": False, "bias": "all"},)

    def __init__(self, config: ObjectRelationConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        wide = param_dtype(dtype)  # biases are added to logits
        self.relation = Linear(8 * config.frequencies, config.heads, ("gates", "gates"), rngs=rngs, dtype=wide)

    def heads(self, x: jax.Array, seq: Sequence, carried: RelationCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c, (B, T, _), (q, k, v) = self.config, x.shape, self.positioned(x, seq)
        boxes = jnp.zeros((B, T, 4)) if seq.boxes is None else jnp.asarray(seq.boxes)
        boxes = boxes.astype(param_dtype(self.dtype))
        if carried is None:
            keys, bounds, state = boxes, seq.mask(causal=c.causal).interval(T, T), None
        else:
            stored, keys = carried.kv.append_beside(carried.boxes, boxes)
            cache, view, mask = carried.kv.append(k, v, seq.offsets, seq.padding)
            (k, v), bounds, state = view.by_position(B), (mask.k_start, mask.k_end), RelationCache(cache, stored)
        if (S := k.shape[1]) > MOST:
            raise UnsupportedPattern(f"mixer {self.name!r}: {S} keys in a row; allowed: at most {MOST}")
        bounds = (jnp.broadcast_to(bound, (B, T)) for bound in bounds)
        of_rows = functools.partial(self._attend, k=k, v=v, keys=keys)
        rows = T if c.impl == "definition" else c.chunk
        return MixerOutput(by_rows(of_rows, q, boxes, *bounds, rows=rows).astype(self.dtype), state)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> RelationCache:
        cache = empty_cache(batch, self.config.key_heads, self.head_dim, max_length, dtype)
        return RelationCache(cache, jnp.zeros((batch, max_length, 4), param_dtype(self.dtype)))

    @classmethod
    def flops(cls, config: ObjectRelationConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        span = mean_visible_keys(length, config.causal, None)
        return {
            "projections": cls.projection_flops(config, width),
            "relations": 16.0 * config.frequencies * config.heads * length,
            "attention": 4.0 * config.heads * config.head_dim(width) * span,
        }, span

    def _attend(
        self, q: jax.Array, boxes: jax.Array, start: jax.Array, end: jax.Array, *, k: jax.Array, v: jax.Array,
        keys: jax.Array,
    ) -> jax.Array:  # fmt: skip
        """o [B, R, H, d] of queries with boxes [B, R, 4], over all keys, of boxes [B, S, 4]."""
        (B, R, H, d), (S, K) = q.shape, k.shape[1:3]
        wide = param_dtype(self.dtype)
        q, k, v = q.reshape(B, R, K, H // K, d).astype(wide), k.astype(wide), v.astype(wide)
        s = jnp.arange(S, dtype=jnp.int32)
        seen = ((s >= start[..., None]) & (s < end[..., None]))[:, :, None, None]
        code = relation_code(boxes, keys, self.config.frequencies, self.config.relation_base)
        both = is_box(boxes)[:, :, None] & is_box(keys)[:, None]
        bias = jnp.where(both[..., None], self.relation(code), 0).reshape(B, R, S, K, H // K)
        logits = jnp.einsum("brkgd,bskd->brkgs", q, k, precision="highest") * d**-0.5 + jnp.moveaxis(bias, 2, 4)
        logits = jnp.where(seen, logits, -jnp.inf)
        most = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(most), most, 0))
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1, total)  # a row that sees nothing gives 0
        return jnp.einsum("brkgs,bskd->brkgd", weights, v, precision="highest").reshape(B, R, H, d)
