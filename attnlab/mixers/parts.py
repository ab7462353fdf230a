"""Parameterised pieces that mixers and models share.

Parameters carry the logical axes that sharding rules map to a mesh, and the role by which optimizers decide.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.roles import Fused, Role, drawn, normal, param
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.linear import linear
from attnlab.ops.norm import layer_norm, rms_norm

_TIME_STEPS = 1e-3, 0.1


class Linear(nnx.Module):
    """`x @ kernel`, plus a bias [out] where asked; both are fp32.

    The kernel [in, out] is normal with standard deviation gain / sqrt(in) at first, the bias 0.

    Args:
      fan_in, fan_out: widths.
      axes: logical axes of the kernel, e.g. ("embed", "heads").
      dtype: of the product.
      role: of the kernel; a matrix unless it is more than that.
      fused: the matrices side by side in the kernel, where the output is cut into parts.
      bias: whether there is one.
      gain: of the first kernel.
    """

    def __init__(
        self, fan_in: int, fan_out: int, axes: tuple[str, str], *, rngs: nnx.Rngs, dtype: Any,
        role: Role = Role.MATRIX, fused: Fused | None = None, bias: bool = False, gain: float = 1.0,
    ):  # fmt: skip
        kind, deviation = param_dtype(dtype), gain / math.sqrt(fan_in)
        self.kernel = drawn(rngs, normal, (fan_in, fan_out), kind, deviation, axes=axes, role=role, fused=fused)
        self.bias = param(jnp.zeros((fan_out,), kind), axes=axes[1:], role=Role.BIAS) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LowRank(nnx.Module):
    """`x W_d W_u`, plus a bias where asked: [..., D] to [..., columns]."""

    def __init__(self, width: int, rank: int, columns: int, *, rngs: nnx.Rngs, dtype: Any, bias: bool = False):
        self.down = Linear(width, rank, ("embed", "gates"), rngs=rngs, dtype=dtype)
        self.up = Linear(rank, columns, ("gates", "heads"), rngs=rngs, dtype=dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.down(x))


class Convolution(nnx.Module):
    """`attnlab.ops.causal_conv.causal_conv` with learned filters [span, channels], and where asked a bias.

    At first both are uniform within 1 / sqrt(span).
    """

    def __init__(self, channels: int, span: int, axis: str, *, rngs: nnx.Rngs, dtype: Any, bias: bool = False):
        kind, bound = param_dtype(dtype), 1 / math.sqrt(span)
        shape = (span, channels)
        self.filters = drawn(rngs, jax.random.uniform, shape, kind, -bound, bound, axes=("conv", axis), role=Role.TAPS)
        args = ((channels,), kind, -bound, bound)
        self.bias = drawn(rngs, jax.random.uniform, *args, axes=(axis,), role=Role.BIAS) if bias else None

    def __call__(
        self, x: jax.Array, documents_BT: jax.Array | None, tail: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """y [B, T, channels] in the dtype of x, and the tail after it, in that of the one before; None: there is none
        and none is asked for."""
        y, after = causal_conv(x, self.filters[...], documents_BT, tail)
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y, None if tail is None else after.astype(tail.dtype)

    def blank_tail(self, batch: int, dtype: Any) -> jax.Array:
        """Before the first position."""
        span, channels = self.filters.shape
        return jnp.zeros((batch, span - 1, channels), dtype)


class LevelWeights(nnx.Module):
    """`softplus(scale * (x W))`, [B, T, H, L], in fp32: how much a query reads of each level of a memory; scale [H, L]
    is 1 at first (Guo et al. 2025, arXiv:2506.04761)."""

    def __init__(self, width: int, heads: int, levels: int, *, rngs: nnx.Rngs, dtype: Any):
        self.linear = Linear(width, heads * levels, ("embed", "heads"), rngs=rngs, dtype=dtype)
        ones = jnp.ones((heads, levels), param_dtype(dtype))
        self.scale = param(ones, axes=("heads", "levels"), role=Role.SCALE)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        return jax.nn.softplus(scale * self.linear(x).reshape(*x.shape[:2], *scale.shape).astype(scale.dtype))


class RMSNorm(nnx.Module):
    """`attnlab.ops.norm.rms_norm` with a learned scale [width], initially one."""

    def __init__(self, width: int, axes: tuple[str], *, dtype: Any, epsilon: float = 1e-6):
        self.scale = param(jnp.ones((width,), param_dtype(dtype)), axes=axes, role=Role.SCALE)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)


class HeadsRMSNorm(nnx.Module):
    """`attnlab.ops.norm.rms_norm` of each head of x [..., H, d], with a learned scale [H, d], initially one.

    `axis` is the logical one of the heads; one head alone, which several devices' queries read, is on all of them.
    """

    def __init__(self, heads: int, width: int, axis: str, *, dtype: Any, epsilon: float = 1e-6):
        ones = jnp.ones((heads, width), param_dtype(dtype))
        self.scale = param(ones, axes=(axis if heads > 1 else "one_head", "head"), role=Role.SCALE)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)


class LayerNorm(nnx.Module):
    """`attnlab.ops.norm.layer_norm` with a learned scale [width], initially one, and bias [width], initially zero."""

    def __init__(self, width: int, axes: tuple[str], *, dtype: Any, epsilon: float = 1e-5):
        self.scale = param(jnp.ones((width,), param_dtype(dtype)), axes=axes, role=Role.SCALE)
        self.bias = param(jnp.zeros((width,), param_dtype(dtype)), axes=axes, role=Role.BIAS)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout (Srivastava et al. 2014): a share `rate` of x is 0, the rest grows by as much; without a key x itself."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def time_steps(key: jax.Array, count: int, dtype: Any) -> jax.Array:
    """What softplus makes time steps of, log-uniform in [0.001, 0.1]."""
    low, high = (math.log(t) for t in _TIME_STEPS)
    step = jnp.exp(jax.random.uniform(key, (count,), dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def log_rates(key: jax.Array, count: int, dtype: Any, low: float = 1.0, high: float = 16.0) -> jax.Array:
    """Logarithms of numbers uniform in [low, high)."""
    return jnp.log(jax.random.uniform(key, (count,), dtype, low, high))


def param_dtype(dtype: Any) -> Any:
    """Parameters are fp32 whatever the compute type, except that float64 models are float64 throughout."""
    return jnp.promote_types(dtype, jnp.float32)
