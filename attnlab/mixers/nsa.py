"""Native sparse attention: means of blocks, the blocks that these make look important, and a window, each gated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.heads import Projections
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION, attention
from attnlab.ops.block_cache import BlockCache
from attnlab.ops.key_blocks import BlockPlaces, blocks_of, by_rows, mask_of_chosen, mean_of_blocks, top
from attnlab.ops.keys_values import Whole
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Mask, mask_for_extension, mean_visible_keys

_IMPLS = "definition", "tiles"


@dataclasses.dataclass(frozen=True)
class NSAConfig(GroupedConfig):
    """Knobs of native sparse attention."""

    block: int = knob(64, "positions of a block, counted from where the document begins", other=(2,), least=1)
    top_k: int = knob(
        16, "blocks that a query's selection holds: the first, its own, the one before, and the most important",
        other=(3,), least=3,
    )  # fmt: skip
    window: int = knob(512, "keys that the window shows, the query's own included", other=(3,), least=1)
    impl: str = knob(
        "auto", "of each branch's attention: auto, tiles (those that no row chose are skipped), definition (all pairs)",
        other=("definition",), choices=("auto", *_IMPLS),
    )  # fmt: skip


def _means(k_BMnKd: jax.Array, v_BMnKd: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mean_of_blocks(k_BMnKd), mean_of_blocks(v_BMnKd)


@register("nsa")
class NSA(GroupedMixer):
    """`sum_c sigmoid(x W_g)_c attention_c(q, K_c, V_c)` over three branches c: compressed, selected, window.

    Compressed: means of keys and values of the complete blocks up to the query. Selected: tokens of `top_k` blocks, the
    same for all heads of a key head: the first one, the own, the one before, and of the others those to which the
    compressed branch's softmax gives most, averaged over the group's heads. Window: the last `window` tokens. A branch
    in which a query sees nothing gives 0. The choice has no gradient; means have one, by the compressed branch.
    """

    Config = NSAConfig
    capabilities = Capabilities()
    sequence_parallel = "keys, values and means are gathered, queries dealt out evenly"
    paper = (
        "Yuan et al. 2025, Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, "
        "arXiv:2502.11089"
    )
    extension = (
        "blocks are compressed by their means, where the paper has a learned map of overlapping ones, and the branches "
        "share keys and values, where the paper projects them for each; blocks begin anew with each packed document"
    )
    implementations = {name: ATTENTION.table[name] for name in _IMPLS}
    variants = (
        {"block": 2, "top_k": 3, "kv_heads": 2, "window": 4},
        {"block": 1, "top_k": 4, "kv_heads": 1, "window": 1, "rope_base": None, "bias": "all"},
    )

    def __init__(self, config: NSAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        self.gate = Projections(config, width, rngs=rngs, dtype=dtype)(3 * config.heads)

    def heads(self, x: jax.Array, seq: Sequence, carried: BlockCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c, (q, k, v), (B, T, _) = self.config, self.positioned(x, seq), x.shape
        if carried is None:
            first, offset = 0, jnp.arange(T, dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
            places, kv = BlockPlaces.of(offset, c.block), Whole(k, v)
            means = _means(*(blocks_of(y, places, one_document=seq.segments is None) for y in (k, v)))
            entry, window = places.entry, seq.mask(causal=True, window=c.window)
        else:
            first = carried.kv.length
            carried, kv, places = carried.append(k, v, seq.offsets, c.block, _means)
            means, entry = carried.summaries, carried.entry
            index = first + jnp.arange(T, dtype=jnp.int32)
            start = jnp.where(seq.padding, index + 1, index - seq.offsets)
            window = mask_for_extension(first, T, start, window=c.window)
        own, earlier = places.own_and_earlier(first, seq.padding)
        selected, compressed = own, 0
        if means[0].shape[1]:
            begin, end = places.entry - places.block, places.entry + places.ends
            seen = Mask(begin, end if seq.padding is None else jnp.where(seq.padding, 0, end))
            compressed = attention(q, *(y.astype(q.dtype) for y in means), seen, impl=c.impl)
            selected = mask_of_chosen(earlier, packed_bits(self.chosen(q, means[0], places)), entry, own)
        decode = "definition" if c.impl == "definition" else "auto"
        attend = lambda mask: kv.attend(q, mask, impl=c.impl, decode_impl=decode)
        branches, wide = (compressed, attend(selected), attend(window)), param_dtype(self.dtype)
        gates = jax.nn.sigmoid(self.gate(x).astype(wide)).reshape(B, T, c.heads, 3)
        o = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
        return MixerOutput(o.astype(self.dtype), carried)

    def chosen(self, q: jax.Array, means: jax.Array, places: BlockPlaces) -> jax.Array:
        """Which complete blocks before its own each position selects, for all heads of a key head: [B, T, K, N]."""
        (B, T, H, d), (N, K) = q.shape, means.shape[1:3]
        q, means = jax.lax.stop_gradient((q, means))
        number = jnp.arange(N, dtype=jnp.int32)

        def of_rows(q, entry, before, ends):
            q = q.reshape(B, -1, K, H // K, d).astype(means.dtype)
            logits = jnp.einsum("btkgd,bnkd->btkgn", q, means, precision="highest") * d**-0.5
            entry, before, ends = (y[..., None, None] for y in (entry, before, ends))
            begin = entry - before
            seen = ((number >= begin) & (number < entry + ends))[:, :, :, None]
            importance = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(logits.dtype).min), axis=-1).mean(3)
            forced = (number == begin) | (number == entry - 1)
            scores = jnp.where(forced, jnp.inf, importance)
            return top(scores, (number >= begin) & (number < entry), self.config.top_k - 1)

        wide = lambda y: jnp.broadcast_to(y, (B, T))
        return by_rows(of_rows, q, wide(places.entry), wide(places.block), wide(places.ends))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> BlockCache:
        c = self.config
        return BlockCache.empty(batch, c.key_heads, self.head_dim, max_length, c.block, dtype, _means)

    @classmethod
    def flops(cls, config: NSAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        inner = config.heads * config.head_dim(width)
        span = sum(seen(t, config.block, config.top_k) for t in range(length)) / length
        span += mean_visible_keys(length, True, config.window)
        return {
            "projections": cls.projection_flops(config, width) + 6.0 * width * config.heads,
            "importance": 2.0 * inner * (length // config.block),
            "attention": 4.0 * inner * span,
        }, span


def seen(t: int, block: int, top_k: int) -> int:
    """Means and selected keys that the query at position t of a document attends to."""
    return (t + 1) // block + t % block + 1 + block * min(top_k - 1, t // block)
