"""DeepSeek's sparse attention: a small indexer scores all keys, and latent attention reads the best of them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.heads import Projections, split_heads
from attnlab.mixers.mla import MLA, MLAConfig
from attnlab.mixers.parts import LayerNorm, Linear, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops.indexed_attention import ROWS, indexed_attention
from attnlab.ops.key_blocks import by_rows, top
from attnlab.ops.keys_values import KVCache, Whole
from attnlab.ops.masks import mean_visible_keys
from attnlab.ops.rope import rope

_IMPLS = "indexed", "definition"


@dataclasses.dataclass(frozen=True)
class DSAConfig(MLAConfig):
    """Knobs of DeepSeek's sparse attention, beside those of latent attention."""

    causal: ClassVar[bool] = True
    decode_impl: ClassVar[str] = "auto"
    mask: ClassVar[None] = None
    turns_more: ClassVar[bool] = True  # the indexer's channels

    top_k: int = knob(64, "keys that a query attends to, the same for all heads", other=(3,), least=1)
    index_heads: int = knob(4, "heads of the indexer", other=(2,), least=1)
    index_width: int = knob(16, "width of its heads, of which RoPE turns half", other=(8,), least=4)
    index_loss: float = knob(1.0, "weight of the loss that the indexer alone learns by", other=(0.5,), least=0)
    impl: str = knob("indexed", "indexed, or definition (all pairs)", other=("definition",), choices=_IMPLS)


@dataclasses.dataclass
class _Chosen:
    """Keys and values [B, S, K, ...] of which each query reads those that it is given, the same for all heads."""

    k: jax.Array
    v: jax.Array
    index: jax.Array
    valid: jax.Array
    shares: jax.Array | None = None  # the weights, means over heads, once they are known

    def attend(self, q_BTHd: jax.Array, mask: Any, *, scale: float, **options: Any) -> jax.Array:
        """See `attnlab.ops.keys_values.KeysValues`; the mask is in what is valid."""
        kv, chosen = (
            (y.astype(q_BTHd.dtype) for y in (self.k, self.v)),
            (self.index[:, :, None], self.valid[:, :, None]),
        )
        o, shares = indexed_attention(q_BTHd, *kv, *chosen, scale=scale)
        self.shares = shares[:, :, 0]
        return o


@register("dsa")
class DSA(MLA):
    """Latent attention to the `top_k` keys of the prefix with the highest `I_s = sum_j w_j relu(q_j . k_s)`.

    q_j, of index heads j, and w are made of the query's position, k_s is one LayerNormed key; all of inputs that are
    held constant. The indexer learns by the loss `KL(p | softmax(I))` over the chosen keys alone, p the mean of the
    heads' attention weights, held constant too; nothing else learns by it, nor the indexer by anything else.
    """

    Config = DSAConfig
    capabilities = Capabilities()
    sequence_parallel = "latents and index keys are gathered, queries stay where they are"
    paper = "DeepSeek-AI 2025, DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models, arXiv:2512.02556"
    extension = "the indexer learns from the first step with the chosen keys, without a stage that is dense"
    implementations = _IMPLS
    variants = (
        {"heads": 2, "rank": 5, "query_rank": 6, "value_width": 3, "top_k": 3, "bias": "all"},
        {"rotary_width": 0, "top_k": 4, "rope_base": None},
    )

    def __init__(self, config: DSAConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, columns = Projections(config, width, rngs=rngs, dtype=dtype), config.index_heads * config.index_width
        self.index_q = Linear(config.query_rank or width, columns, ("embed", "gates"), rngs=rngs, dtype=dtype)
        self.index_k, self.index_w = make(config.index_width, "gates"), make(config.index_heads, "gates")
        self.index_norm = LayerNorm(config.index_width, ("gates",), dtype=dtype)

    def heads(self, x: jax.Array, seq: Sequence, carried: KVCache | None = None) -> MixerOutput:
        """As in the contract. More positions than the cache has room for give NaN, as jit can raise nothing."""
        q, latents, (index_q, weights, index_k) = self.queries(x, seq), self.latents(x, seq), self.indexer(x, seq)
        if carried is None:
            start, end = seq.mask(causal=True).interval(x.shape[1], x.shape[1])
        else:
            carried, view, mask = carried.append(latents, index_k[:, :, None], seq.offsets, seq.padding)
            start, end, (latents, index_k) = mask.k_start, mask.k_end, view.by_position(len(x))
            latents, index_k = jnp.where(carried.length <= latents.shape[1], latents, jnp.nan), index_k[:, :, 0]
        wide = lambda y: jnp.broadcast_to(y, x.shape[:2])
        if self.config.impl == "definition" and carried is None:
            o, shares, scores, valid = self._all_pairs(q, latents, index_q, weights, index_k, wide(start), wide(end))
        else:
            index, valid, scores = self.best(index_q, weights, index_k, wide(start), wide(end))
            absorbs = carried is not None and self.absorbs(x.shape[1])
            kv = Whole(latents, latents) if absorbs else self.expanded(q, latents)
            chosen = _Chosen(kv.k, kv.v, index, valid)
            o = self.absorbed(q, chosen, None) if absorbs else chosen.attend(q, None, **self._options)
            shares = chosen.shares
        return MixerOutput(o, carried, losses=self._losses(scores, shares, valid, seq.padding))

    def indexer(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The indexer's queries [B, T, J, d_I], their weights [B, T, J] in fp32 or wider, and keys [B, T, d_I]."""
        c, source = self.config, x if self.config.query_rank is None else self.q_norm(self.q_down(x))
        x, source = jax.lax.stop_gradient((x, source))
        q, k = split_heads(self.index_q(source), c.index_width), self.index_norm(self.index_k(x))[:, :, None]
        if c.rope_base is not None:
            turned = c.index_width // 4 * 2
            q, k = (rope(y, seq.positions, c.rope_base, turned) for y in (q, k))
        weights = self.index_w(x).astype(param_dtype(self.dtype)) * (c.index_heads * c.index_width) ** -0.5
        return q, weights, k[:, :, 0]

    def best(self, q_BTJd, weights_BTJ, k_BSd, start_BT, end_BT) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The best keys of each query, [B, T, n] each: which, whether there is one, and its score; `ROWS` at a time."""
        n, s = min(self.config.top_k, k_BSd.shape[1]), jnp.arange(k_BSd.shape[1], dtype=jnp.int32)

        @jax.checkpoint
        def of_rows(q, weights, start, end):
            scores = index_scores(q, weights, k_BSd)
            seen = (s >= start[..., None]) & (s < end[..., None])
            hidden = jnp.where(seen, jax.lax.stop_gradient(scores), -jnp.inf)
            index = jax.lax.top_k(hidden, n)[1].astype(jnp.int32)
            along = lambda y: jnp.take_along_axis(y, index, axis=-1)
            return index, along(seen), along(scores)

        return by_rows(of_rows, q_BTJd, weights_BTJ, start_BT, end_BT, rows=ROWS)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> KVCache:
        latents = super().init_carried(batch, max_length, dtype).k
        return KVCache(
            latents, jnp.zeros((*latents.shape[:2], self.config.index_width), dtype), jnp.zeros((), jnp.int32)
        )

    @classmethod
    def flops(cls, config: DSAConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, full = super().flops(config, width, length)
        J, d, span = config.index_heads, config.index_width, mean_visible_keys(length, True, config.top_k)
        of_index = (config.query_rank or width) * J * d + width * (d + J)
        if config.query_rank is not None:
            of_index += width * config.query_rank
        return {
            "projections": flops["projections"],
            "indexer": 2.0 * (of_index + J * (d + 1) * length),
            "attention": flops["attention"] / full * span,
        }, span

    # Inside.

    def _losses(self, scores, shares, valid, padding) -> dict[str, jax.Array]:
        """KL divergence of the indexer's softmax over what was chosen from the attention's weights, their mean."""
        scores = jnp.where(valid, scores, jnp.finfo(scores.dtype).min)
        log_index = jnp.where(valid, jax.nn.log_softmax(scores, axis=-1), 0)
        p = jax.lax.stop_gradient(shares)
        divergence = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_index, axis=-1)
        used = jnp.ones_like(divergence) if padding is None else (~padding).astype(divergence.dtype)
        return {"indexer": self.config.index_loss * jnp.sum(divergence * used) / jnp.maximum(used.sum(), 1)}

    def _all_pairs(self, q, latents, index_q, weights, index_k, start, end):
        """The definition: all heads' keys and values, and every pair."""
        wide, kv = param_dtype(self.dtype), self.expanded(q, latents)
        scores = index_scores(index_q, weights, index_k)
        s = jnp.arange(latents.shape[1], dtype=jnp.int32)
        seen = top(jax.lax.stop_gradient(scores), (s >= start[..., None]) & (s < end[..., None]), self.config.top_k)
        logits = jnp.einsum("bthd,bshd->bhts", q.astype(wide), kv.k.astype(wide), precision="highest")
        logits = jnp.where(seen[:, None], logits * q.shape[-1] ** -0.5, jnp.finfo(wide).min)
        p = jnp.where(seen[:, None], jax.nn.softmax(logits, axis=-1), 0)
        o = jnp.einsum("bhts,bshe->bthe", p, kv.v.astype(wide), precision="highest")
        return o.astype(q.dtype), p.mean(1), scores, seen


def index_scores(q_BTJd: jax.Array, weights_BTJ: jax.Array, k_BSd: jax.Array) -> jax.Array:
    """`sum_j w_j relu(q_j . k_s)`, [B, T, S], in fp32 or wider."""
    product = lambda *args: jnp.einsum(*args, precision="highest", preferred_element_type=weights_BTJ.dtype)
    return product("btjs,btj->bts", jax.nn.relu(product("btjd,bsd->btjs", q_BTJd, k_BSd)), weights_BTJ)
