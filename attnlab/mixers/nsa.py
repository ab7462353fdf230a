"""Native sparse attention: means of blocks, the blocks that these make look important, and a window, each gated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.heads import Projections, split_heads
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, drawn, normal
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION, attention
from attnlab.ops.block_cache import BlockCache
from attnlab.ops.key_blocks import BlockPlaces, blocks_of, by_rows, mask_of_chosen, mean_of_blocks, top
from attnlab.ops.keys_values import Cached, Whole
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Mask, mask_for_extension, mean_visible_keys

_IMPLS = "definition", "tiles"
_HIDDEN = 2  # of the learned map of blocks: its hidden width is so many times d


@dataclasses.dataclass(frozen=True)
class NSAConfig(GroupedConfig):
    """Knobs of native sparse attention."""

    block: int = knob(64, "positions of a block, counted from where the document begins", other=(2,), least=1)
    top_k: int = knob(
        16, "blocks that a query's selection holds: the first, its own, the one before, and the most important",
        other=(3,), least=3,
    )  # fmt: skip
    window: int = knob(512, "keys that the window shows, the query's own included", other=(3,), least=1)
    compress: str = knob(
        "mean", "what makes one key and one value of a block: mean, or mlp, a learned map of all of the block's, each "
        "with a learned vector of its place in the block", other=("mlp",), choices=("mean", "mlp"),
    )  # fmt: skip
    branches: str = knob(
        "shared", "keys and values: shared by the branches, or each branch's own", other=("own",),
        choices=("shared", "own"),
    )  # fmt: skip
    impl: str = knob(
        "auto", "of each branch's attention: auto, tiles (those that no row chose are skipped), definition (all pairs)",
        other=("definition",), choices=("auto", *_IMPLS),
    )  # fmt: skip


class BlockMap(nnx.Module):
    """`gelu([x_1 + p_1, .., x_n + p_n] W_1) W_2` of a block's n keys or values of a head, all heads alike."""

    def __init__(self, block: int, d: int, *, rngs: nnx.Rngs, dtype: Any):
        options = {"rngs": rngs, "dtype": dtype}
        self.inner = Linear(block * d, _HIDDEN * d, ("embed", "gates"), **options)
        self.outer = Linear(_HIDDEN * d, d, ("gates", "embed"), **options)
        args = (block, d), param_dtype(dtype), 0.02
        self.places = drawn(rngs, normal, *args, axes=("conv", "head"), role=Role.POSITIONS)

    def __call__(self, x_BMnKd: jax.Array) -> jax.Array:
        """[B, M, K, d], in fp32 or wider."""
        wide = param_dtype(x_BMnKd.dtype)
        x = x_BMnKd.astype(wide) + self.places[...][:, None].astype(wide)
        x = x.swapaxes(2, 3).reshape(*x.shape[:2], x.shape[3], -1)
        return self.outer(jax.nn.gelu(self.inner(x), approximate=False)).astype(wide)


@register("nsa")
class NSA(GroupedMixer):
    """`sum_c sigmoid(x W_g)_c attention_c(q, K_c, V_c)` over three branches c: compressed, selected, window.

    Compressed: one key and one value of each complete block up to the query, its mean or a learned map (`compress`).
    Selected: tokens of `top_k` blocks, the same for all heads of a key head: the first one, the own, the one before,
    and of the others those to which the compressed branch's softmax gives most, averaged over the group's heads.
    Window: the last `window` tokens. A branch in which a query sees nothing gives 0. The choice has no gradient; what
    blocks are compressed to has one, by the compressed branch. The branches share keys and values, or have their own.
    """

    Config = NSAConfig
    capabilities = Capabilities()
    sequence_parallel = "keys, values and means are gathered, queries dealt out evenly"
    paper = (
        "Yuan et al. 2025, Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, "
        "arXiv:2502.11089"
    )
    extension = (
        "blocks that are compressed do not overlap, where the paper's are longer than their stride; compress=mean and "
        "branches=shared, as in public code, where the paper has the others; depth, width and activation of the "
        "learned map, which the paper leaves open; blocks begin anew with each packed document"
    )
    implementations = {name: ATTENTION.table[name] for name in _IMPLS}
    variants = (
        {"block": 2, "top_k": 3, "kv_heads": 2, "window": 4},
        {"block": 1, "top_k": 4, "kv_heads": 1, "window": 1, "rope_base": None, "bias": "all"},
        {"block": 2, "top_k": 3, "kv_heads": 2, "window": 4, "compress": "mlp", "branches": "own"},
    )

    def __init__(self, config: NSAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, keys = Projections(config, width, rngs=rngs, dtype=dtype), config.key_heads * self.head_dim
        self.gate = make(3 * config.heads)
        if config.branches == "own":  # k and v are the selected branch's
            self.compressed_k, self.compressed_v = (make.qkv(keys, "kv_heads") for _ in range(2))
            self.window_k, self.window_v = (make.qkv(keys, "kv_heads") for _ in range(2))
        if config.compress == "mlp":
            maps = functools.partial(BlockMap, config.block, self.head_dim, rngs=rngs, dtype=dtype)
            self.map_k, self.map_v = maps(), maps()

    def heads(self, x: jax.Array, seq: Sequence, carried: BlockCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        c, (q, k, v), (B, T, _) = self.config, self._projected(x, seq), x.shape
        if carried is None:
            first, offset = 0, jnp.arange(T, dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
            places, kv = BlockPlaces.of(offset, c.block), Whole(k, v)
            means = self.summary(*(blocks_of(y, places, one_document=seq.segments is None) for y in (k, v)))
            entry, window = places.entry, seq.mask(causal=True, window=c.window)
        else:
            first = carried.kv.length
            carried, kv, places = carried.append(k, v, seq.offsets, c.block, self.summary)
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
        attend = lambda i, mask: self._of_branch(kv, i, B).attend(q, mask, impl=c.impl, decode_impl=decode)
        branches, wide = (compressed, attend(0, selected), attend(2, window)), param_dtype(self.dtype)
        gates = jax.nn.sigmoid(self.gate(x).astype(wide)).reshape(B, T, c.heads, 3)
        o = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
        return MixerOutput(o.astype(self.dtype), carried)

    def summary(self, k_BMnKd: jax.Array, v_BMnKd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the blocks are compressed to, [B, M, K, d] each; of keys and values of all branches side by side."""
        if self.config.compress == "mean":
            return self._means(k_BMnKd, v_BMnKd)
        return self.map_k(self._compressed(k_BMnKd)), self.map_v(self._compressed(v_BMnKd))

    def _means(self, k_BMnKd: jax.Array, v_BMnKd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`summary` of means; what a map makes of blocks has the same form."""
        return mean_of_blocks(self._compressed(k_BMnKd)), mean_of_blocks(self._compressed(v_BMnKd))

    def _compressed(self, x_BMnKd: jax.Array) -> jax.Array:
        """Of keys or values of all branches side by side those of the compressed one."""
        K = self.config.key_heads
        return x_BMnKd[:, :, :, K : 2 * K] if self.config.branches == "own" else x_BMnKd

    def _projected(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, H, d] after RoPE; keys, after RoPE, and values: of branches of their own 3 K heads, selected,
        compressed, window."""
        q, k, v = self.positioned(x, seq)
        if self.config.branches == "shared":
            return q, k, v
        of_heads = lambda *parts: [split_heads(y(x), self.head_dim) for y in parts]
        more = jnp.concatenate(of_heads(self.compressed_k, self.window_k), axis=2)
        k = jnp.concatenate([k, self.config.rotated(more, seq.positions)], axis=2)
        return q, k, jnp.concatenate([v, *of_heads(self.compressed_v, self.window_v)], axis=2)

    def _of_branch(self, kv: Whole | Cached, number: int, batch: int) -> Whole | Cached:
        """The keys and values of one branch, in the order of `_projected`."""
        if self.config.branches == "shared":
            return kv
        K = self.config.key_heads
        if isinstance(kv, Whole):
            own = lambda y: y[:, :, number * K : (number + 1) * K]
        else:
            own = lambda y: y.reshape(batch, 3, K, *y.shape[1:])[:, number].reshape(batch * K, *y.shape[1:])
        return dataclasses.replace(kv, k=own(kv.k), v=own(kv.v))

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
        kept = c.key_heads * (3 if c.branches == "own" else 1)
        return BlockCache.empty(batch, kept, self.head_dim, max_length, c.block, dtype, self._means)

    @classmethod
    def flops(cls, config: NSAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, n, K = config.head_dim(width), config.block, config.key_heads
        inner, blocks = config.heads * d, length // n
        span = sum(seen(t, n, config.top_k) for t in range(length)) / length
        span += mean_visible_keys(length, True, config.window)
        more = 8.0 * width * K * d * (config.branches == "own")
        found = {
            "projections": cls.projection_flops(config, width) + more + 6.0 * width * config.heads,
            "importance": 2.0 * inner * blocks,
            "attention": 4.0 * inner * span,
        }
        if config.compress == "mlp":
            found["compression"] = 4.0 * K * _HIDDEN * d * d * (n + 1) * blocks / length
        return found, span


def seen(t: int, block: int, top_k: int) -> int:
    """Means and selected keys that the query at position t of a document attends to."""
    return (t + 1) // block + t % block + 1 + block * min(top_k - 1, t // block)
