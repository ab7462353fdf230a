"""MoBA: each query attends to its own block of keys and to the earlier blocks whose mean keys it likes best."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION
from attnlab.ops.block_cache import BlockCache
from attnlab.ops.key_blocks import BlockPlaces, blocks_of, by_rows, mask_of_chosen, mean_of_blocks, top
from attnlab.ops.keys_values import Whole
from attnlab.ops.mask_algebra import packed_bits

_IMPLS = "definition", "tiles"


@dataclasses.dataclass(frozen=True)
class MoBAConfig(GroupedConfig):
    """Knobs of MoBA."""

    block: int = knob(64, "positions of a block, counted from where the document begins", other=(3,), least=1)
    top_k: int = knob(3, "blocks that a query attends to, its own counted", other=(2, 1), least=1)
    impl: str = knob(
        "auto", "auto (tiles), tiles (those that no row chose are skipped), definition (all pairs)",
        other=("definition",), choices=("auto", *_IMPLS),
    )  # fmt: skip


def _mean_keys(k_BMnKd: jax.Array, v_BMnKd: jax.Array) -> tuple[jax.Array]:
    return (mean_of_blocks(k_BMnKd),)


@register("moba")
class MoBA(GroupedMixer):
    """Softmax attention over the own block up to the query and, of the complete blocks before, the top_k - 1 best ones.

    A query head's score of a block is `q . mean of the block's keys`, both after RoPE, in fp32; of equal scores the
    earliest block wins. Neither scores nor means have a gradient: what trains the choice is the attention itself.
    """

    Config = MoBAConfig
    capabilities = Capabilities()
    sequence_parallel = "keys and values are gathered, queries stay where they are"
    paper = "Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv:2502.13189"
    extension = "blocks begin anew with each packed document; equal scores are decided for the earliest block"
    implementations = {name: ATTENTION.table[name] for name in _IMPLS}
    variants = (
        {"block": 2, "top_k": 2, "kv_heads": 2},
        {"block": 1, "top_k": 4, "kv_heads": 1, "rope_base": None, "bias": "all"},
    )

    def heads(self, x: jax.Array, seq: Sequence, carried: BlockCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c, (q, k, v), first = self.config, self.positioned(x, seq), 0
        if carried is None:
            offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
            places, kv = BlockPlaces.of(offset, c.block), Whole(k, v)
            (means,) = _mean_keys(*(blocks_of(y, places, one_document=seq.segments is None) for y in (k, v)))
            entry = places.entry
        else:
            first = carried.kv.length
            carried, kv, places = carried.append(k, v, seq.offsets, c.block, _mean_keys)
            (means,), entry = carried.summaries, carried.entry
        own, earlier = places.own_and_earlier(first, seq.padding)
        mask = own
        if c.top_k > 1 and means.shape[1]:
            mask = mask_of_chosen(earlier, packed_bits(self.chosen(q, means, places)), entry, own)
        decode = "definition" if c.impl == "definition" else "auto"
        return MixerOutput(kv.attend(q, mask, impl=c.impl, decode_impl=decode), carried)

    def chosen(self, q: jax.Array, means: jax.Array, places: BlockPlaces) -> jax.Array:
        """Which complete blocks before its own each query head attends to: bool [B, T, H, N]."""
        (B, T, H, d), (N, K) = q.shape, means.shape[1:3]
        q, means = jax.lax.stop_gradient((q, means))
        number = jnp.arange(N, dtype=jnp.int32)

        def of_rows(q, end, before):
            q = q.reshape(B, -1, K, H // K, d).astype(means.dtype)
            scores = jnp.einsum("btkgd,bnkd->btkgn", q, means, precision="highest").reshape(B, -1, H, N)
            end, before = end[..., None, None], before[..., None, None]
            return top(scores, (number < end) & (number >= end - before), self.config.top_k - 1)

        wide = lambda y: jnp.broadcast_to(y, (B, T))
        return by_rows(of_rows, q, wide(places.entry), wide(places.block))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> BlockCache:
        c = self.config
        return BlockCache.empty(batch, c.key_heads, self.head_dim, max_length, c.block, dtype, _mean_keys)

    @classmethod
    def flops(cls, config: MoBAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        inner = config.heads * config.head_dim(width)
        span = sum(seen(t, config.block, config.top_k) for t in range(length)) / length
        return {
            "projections": cls.projection_flops(config, width),
            "gate": 2.0 * inner * (length // config.block) * (config.top_k > 1),
            "attention": 4.0 * inner * span,
        }, span


def seen(t: int, block: int, top_k: int) -> int:
    """Keys that the query at position t of a document attends to."""
    return t % block + 1 + block * min(top_k - 1, t // block)
