"""RAttention: softmax attention over a window, and linear attention to all that lies before the window."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.base import Capabilities, MixerOutput, knob, register
from attnlab.mixers.grouped import GroupedConfig, GroupedMixer
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.sequence import Sequence
from attnlab.ops.keys_values import RollingCache, Whole, cache_rows
from attnlab.ops.linear import per_channel
from attnlab.ops.linear_recurrence import flops_per_token, linear_recurrence
from attnlab.ops.masks import mean_visible_keys

# Of the attention beside the recurrence, by the knob `impl`.
_ATTENTION = {"auto": "auto", "chunked": "xla", "definition": "definition"}
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class RAttentionConfig(GroupedConfig):
    """Knobs of RAttention."""

    window: int = knob(
        512, "keys of the softmax, the position itself among them; the others are read through a state", other=(3, 1),
        least=1,
    )  # fmt: skip
    features: str = knob(
        "softmax", "f of the linear attention's features [f(x), f(-x)]: softmax over a head's channels, or relu",
        other=("relu",), choices=("softmax", "relu"),
    )  # fmt: skip
    chunk: int = knob(64, "positions computed as one product; changes only speed and memory", other=(4,), least=1)
    impl: str = knob(
        "auto", "auto, chunked (a recurrence, and attention in blocks of XLA), or definition (all pairs)",
        other=("definition",), choices=tuple(_ATTENTION),
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RAttentionState:
    """What the next positions need.

    Attributes:
      cache: the newest `window` keys, before RoPE, and values: one more than the softmax needs, the next to go.
      positions: [B, window, 1] int32, by which RoPE turns these keys.
      memory: [B, H, 2 d, d], sums of features and values of all keys before those, fp32 (fp64 in a float64 model).
    """

    cache: RollingCache
    positions: jax.Array
    memory: jax.Array


@register("rattention")
class RAttention(GroupedMixer):
    """`norm(softmax attention over the last w keys) + norm(sum over the keys before them of (phi(q) . phi(k)) v)`.

    Both parts have the same queries, keys and values. RoPE turns those of the softmax alone. phi(x) is [f(x), f(-x)],
    in fp32, with f the softmax over the channels of a head, or relu; the sum has no scale and no denominator. Each part
    has an RMS norm of each head, with its own scale [H, d]; these scales are all that it has beyond softmax attention.
    """

    Config = RAttentionConfig
    capabilities = Capabilities(fixed_state=True)
    sequence_parallel = "the state is passed on as a sum; keys and values of the window are gathered"
    paper = (
        "Wang et al. 2025, RATTENTION: Towards the Minimal Sliding Window Size in Local-Global Attention Models, "
        "arXiv:2506.15545"
    )
    implementations = ("definition", "chunked")
    counted = "chunked"
    variants = ({"window": 2, "features": "relu", "kv_heads": 2, "chunk": 3, "rope_base": None},)

    def __init__(self, config: RAttentionConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        ones = jnp.ones((config.heads, self.head_dim), param_dtype(dtype))
        self.near_scale, self.far_scale = (param(ones, axes=("heads", "head"), role=Role.SCALE) for _ in range(2))

    def heads(self, x: jax.Array, seq: Sequence, carried: RAttentionState | None = None) -> MixerOutput:
        """As in the contract."""
        c, (q, k, v) = self.config, self.projected(x)
        turned = c.rotated(q, seq.positions)
        decode = "definition" if c.impl == "definition" else "auto"
        if carried is None:
            kv, mask = Whole(c.rotated(k, seq.positions), v), seq.mask(causal=True, window=c.window)
            gone, state = tuple(_later(y, c.window) for y in (k, v)), None
        else:
            kv, mask, gone, state = self._appended(k, v, seq, carried)
        near = kv.attend(turned, mask, impl=_ATTENTION[c.impl], decode_impl=decode)
        far, memory = self._far(q, *gone, seq, None if carried is None else carried.memory)
        o = self._normed(near, self.near_scale[...]) + self._normed(far, self.far_scale[...])
        return MixerOutput(o.astype(self.dtype), state and dataclasses.replace(state, memory=memory))

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> RAttentionState:
        c, d = self.config, self.head_dim
        blank = cache_rows(jnp.zeros((batch, c.window, c.key_heads, d)), dtype)
        memory = jnp.zeros((batch, c.heads, 2 * d, d), param_dtype(self.dtype))
        return RAttentionState(RollingCache(blank, blank), jnp.zeros((batch, c.window, 1), jnp.int32), memory)

    @classmethod
    def flops(cls, config: RAttentionConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        H, d = config.heads, config.head_dim(width)
        span = mean_visible_keys(length, True, config.window)
        return {
            "projections": cls.projection_flops(config, width),
            "attention": 4.0 * H * d * span,
            "recurrence": H * flops_per_token(length, config.chunk, 2 * d, d),
        }, span

    # Inside.

    def _appended(self, k: jax.Array, v: jax.Array, seq: Sequence, before: RAttentionState) -> tuple[Any, ...]:
        """What the softmax of the next positions reads and its mask, what leaves the window for each, the state."""
        (B, T, K, _), c = k.shape, self.config
        cache, kv, mask = before.cache.append(k, v, seq.offsets, seq.padding, c.window)
        positions, turned_by = cache.append_beside(before.positions, seq.positions[..., None])
        by_position = lambda y: y.reshape(B, K, *y.shape[1:]).swapaxes(1, 2)
        keys, values = by_position(kv.k), by_position(kv.v)
        gone = keys[:, :T], values[:, :T]
        kv = dataclasses.replace(kv, k=cache_rows(c.rotated(keys, turned_by[..., 0]), k.dtype))
        return kv, mask, gone, RAttentionState(cache, positions, before.memory)

    def _far(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence, memory: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Linear attention to what has left the window: k and v [B, T, K, d] are those of `window` positions before."""
        c, wide = self.config, param_dtype(self.dtype)
        index = jnp.arange(q.shape[1], dtype=jnp.int32)[None] if seq.offsets is None else seq.offsets
        there = (index >= c.window)[..., None, None]
        of_heads = lambda y: jnp.repeat(y, c.heads // c.key_heads, axis=2)
        k, v = of_heads(self._features(k.astype(wide))), of_heads(v.astype(wide))
        return linear_recurrence(
            self._features(q.astype(wide)), jnp.where(there, k, 0), jnp.where(there, v, 0),
            documents_BT=seq.documents, state_BHde=memory, chunk=c.chunk, impl=c.impl,
        )  # fmt: skip

    def _features(self, x: jax.Array) -> jax.Array:
        """[..., 2 d]."""
        f = jax.nn.softmax if self.config.features == "softmax" else jax.nn.relu
        return jnp.concatenate([f(x), f(-x)], axis=-1)

    def _normed(self, o: jax.Array, scale_Hd: jax.Array) -> jax.Array:
        """Each head's output by its root mean square, times the scale of its channels."""
        wide = param_dtype(self.dtype)
        o = o.astype(wide)
        o *= jax.lax.rsqrt(jnp.mean(o * o, axis=-1, keepdims=True) + _EPSILON)
        return per_channel(scale_Hd.astype(wide).ravel(), o.reshape(*o.shape[:2], -1)).reshape(o.shape)


def _later(y: jax.Array, by: int) -> jax.Array:
    """[B, T, ...], at each position what stood `by` positions before; 0 at the first ones."""
    T = y.shape[1]
    return jnp.pad(y, [(0, 0), (min(by, T), 0)] + [(0, 0)] * (y.ndim - 2))[:, :T]
