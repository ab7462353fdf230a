"""Core-context-aware attention: near keys as they are, far ones as one core for each group of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.sequence import Sequence
from attnlab.ops.attention import ATTENTION_WITH_LSE, attention_with_lse
from attnlab.ops.key_blocks import BlockPlaces, at_blocks
from attnlab.ops.keys_values import KVCache, RollingCache, empty_cache
from attnlab.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class CoreContextConfig(GroupedConfig):
    """Knobs of core-context-aware attention."""

    group: int = knob(
        16, "positions that one core stands for, g, counted from the document's start", other=(2,), least=1
    )
    window: int = knob(128, "keys that are seen as they are, w, the query's own included", other=(3,), least=1)
    cores: str = knob(
        "query_heads",
        "heads that have cores of their own: query_heads; kv_heads: made with the mean of the queries of a key head",
        other=("kv_heads",),
        choices=("query_heads", "kv_heads"),
    )
    log_size: bool = knob(False, "whether a core's logit has log g added, as it stands for g keys", other=(True,))
    impl: str = impl_knob(ATTENTION_WITH_LSE)

    @property
    def raw(self) -> int:
        """The most keys that are seen as they are."""
        return self.window + self.group - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoreState:
    """The newest keys and values, and the cores of all complete groups.

    Attributes:
      cache: the newest w + g - 2 keys and values.
      k, v: cores, [B, N, h, d].
      done: [B] int32, groups completed so far.
    """

    cache: KVCache | RollingCache
    k: jax.Array
    v: jax.Array
    done: jax.Array


@register("core_context")
class CoreContext(GroupedMixer):
    """One softmax over the cores of the first P groups and over all keys behind these, P = (t + 1 - w) // g or 0.

    Group p is the positions g p to g p + g - 1 of a document; with q its last query, after RoPE as the keys are,
    `pi = softmax_j(q . k_j / sqrt(d))` over the group, its core is `sum_j pi_j k_j`, with the value `sum_j pi_j v_j`.
    Every position up to t is seen exactly once. Gradients go through `pi` too.
    """

    Config = CoreContextConfig
    capabilities = Capabilities()
    sequence_parallel = "keys, values and cores are gathered, queries dealt out evenly"
    paper = "Chen et al. 2024, Core Context Aware Transformers for Long Context Language Modeling, arXiv:2412.12465"
    extension = "groups begin anew with each packed document; cores of key heads, and log g in their logits, as knobs"
    implementations = ATTENTION_WITH_LSE.table
    variants = (
        {"group": 2, "window": 3, "kv_heads": 2, "log_size": True},
        {"group": 3, "window": 2, "kv_heads": 1, "cores": "kv_heads", "rope_base": None, "bias": "all"},
    )

    def heads(self, x: jax.Array, seq: Sequence, carried: CoreState | None = None) -> MixerOutput:
        """As in the contract. More positions than the state has room for give NaN, as jit can raise nothing."""
        c, (q, k, v), T = self.config, self.positioned(x, seq), x.shape[1]
        if carried is not None:
            return self._extended(q, k, v, seq, carried)
        offset = jnp.arange(T, dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
        places = BlockPlaces.of(offset, c.group)
        begin = jnp.arange(T, dtype=jnp.int32) - offset + c.group * self.groups_behind(offset)
        near = Mask(begin, causal=True, window=c.raw)
        if seq.padding is not None:
            near = dataclasses.replace(near, k_start=jnp.where(seq.padding, T, begin))
        o, lse = attention_with_lse(q, k, v, near, impl=c.impl)
        if T - c.window < c.group:
            return MixerOutput(o)
        last = jnp.broadcast_to(places.last_positions()[0][:, : T // c.group], (len(x), T // c.group))
        cores = self.made(
            q[jnp.arange(len(x))[:, None], last], at_blocks(k, last, c.group), at_blocks(v, last, c.group)
        )
        return MixerOutput(self._with_cores(o, lse, q, *cores, places, seq.padding))

    def groups_behind(self, offset: jax.Array) -> jax.Array:
        """P of queries with so many positions of their document before them."""
        return jnp.maximum(offset + 1 - self.config.window, 0) // self.config.group

    def made(self, q_BMHd: jax.Array, k_BMgKd: jax.Array, v_BMgKd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cores and their values [B, M, h, d] of groups, from the last query of each."""
        (B, M, H, d), K = q_BMHd.shape, k_BMgKd.shape[3]
        wide = jnp.promote_types(q_BMHd.dtype, jnp.float32)
        q, k, v = (y.astype(wide) for y in (q_BMHd.reshape(B, M, K, H // K, d), k_BMgKd, v_BMgKd))
        if self.config.cores == "kv_heads":
            q = q.mean(3, keepdims=True)
        product = lambda *args: jnp.einsum(*args, precision="highest")
        weights = jax.nn.softmax(product("bmkhd,bmjkd->bmkhj", q, k) * d**-0.5, axis=-1)
        core = lambda y: product("bmkhj,bmjkd->bmkhd", weights, y).reshape(B, M, -1, d).astype(q_BMHd.dtype)
        return core(k), core(v)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> CoreState:
        c, d = self.config, self.head_dim
        heads = c.heads if c.cores == "query_heads" else c.key_heads
        cores = jnp.zeros((batch, max(1, max_length // c.group), heads, d), dtype)
        cache = empty_cache(batch, c.key_heads, d, max_length, dtype, window=c.raw)
        return CoreState(cache, cores, cores, jnp.zeros((batch,), jnp.int32))

    @classmethod
    def flops(cls, config: CoreContextConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d, g = config.head_dim(width), config.group
        heads = config.heads if config.cores == "query_heads" else config.key_heads
        grouped = length // g * g if length - config.window >= g else 0
        span = sum(seen(t, g, config.window) for t in range(length)) / length
        return {
            "projections": cls.projection_flops(config, width),
            "cores": 6.0 * heads * d * grouped / length,
            "attention": 4.0 * config.heads * d * span,
        }, span

    # Inside.

    def _with_cores(self, o, lse, q, k_BNhd, v_BNhd, places: BlockPlaces, padding: jax.Array | None) -> jax.Array:
        """One softmax over the keys of which `o` and `lse` are, and the cores of the groups behind each row."""
        first = places.entry - places.block
        end = first + self.groups_behind(places.offset)
        far = Mask(first, end if padding is None else jnp.where(padding, 0, end))
        more, lse_more = attention_with_lse(
            q, k_BNhd.astype(q.dtype), v_BNhd.astype(q.dtype), far, impl=self.config.impl
        )
        if self.config.log_size:
            lse_more = lse_more + math.log(self.config.group)
        weight = jax.nn.sigmoid(lse_more - lse)[..., None]
        return ((1 - weight) * o + weight * more).astype(q.dtype)

    def _extended(self, q, k, v, seq: Sequence, state: CoreState) -> MixerOutput:
        c, B, N = self.config, len(q), state.k.shape[1]
        cache, view, interval = state.cache.append(k, v, seq.offsets, seq.padding, c.raw)
        keys, values = view.by_position(B)
        places = BlockPlaces.of(seq.offsets, c.group, state.done)
        index = interval.k_end - 1
        begin = index - seq.offsets + c.group * self.groups_behind(seq.offsets)
        near = dataclasses.replace(interval, k_start=jnp.maximum(interval.k_start, begin))
        o, lse = attention_with_lse(q, keys, values, near, impl=c.impl)
        (last, slot), rows = places.last_positions(), jnp.arange(B)[:, None]
        groups = [at_blocks(y, index[:, :1] + last, c.group) for y in (keys, values)]
        put = lambda old, new: old.at[rows, slot].set(new.astype(old.dtype), mode="drop")
        cores = tuple(map(put, (state.k, state.v), self.made(q[rows, last], *groups)))
        o = self._with_cores(o, lse, q, *cores, places, seq.padding)
        o = jnp.where((places.done <= N)[:, None, None, None], o, jnp.nan)
        return MixerOutput(o, CoreState(cache, *cores, places.done))


def seen(t: int, group: int, window: int) -> int:
    """Cores and keys that the query at position t of a document attends to."""
    behind = max(0, t + 1 - window) // group
    return behind + t + 1 - group * behind
