"""Parameterised pieces that mixers and models share.

Parameters carry the logical axes that sharding rules map to a mesh.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.ops.linear import linear
from attnlab.ops.norm import rms_norm


class Linear(nnx.Module):
    """`x @ kernel`, without bias; the kernel [in, out] is fp32, normal with standard deviation 1 / sqrt(in).

    Args:
      fan_in, fan_out: widths.
      axes: logical axes of the kernel, e.g. ("embed", "heads").
      dtype: of the product.
    """

    def __init__(self, fan_in: int, fan_out: int, axes: tuple[str, str], *, rngs: nnx.Rngs, dtype: Any):
        init = jax.nn.initializers.normal(1 / math.sqrt(fan_in))
        self.kernel = nnx.Param(init(rngs.params(), (fan_in, fan_out), param_dtype(dtype)), axes=axes)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x.astype(self.dtype), self.kernel[...].astype(self.dtype))


class RMSNorm(nnx.Module):
    """`attnlab.ops.norm.rms_norm` with a learned scale [width], initially one."""

    def __init__(self, width: int, axes: tuple[str], *, dtype: Any, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype(dtype)), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)


def param_dtype(dtype: Any) -> Any:
    """Parameters are fp32 whatever the compute type, except that float64 models are float64 throughout."""
    return jnp.promote_types(dtype, jnp.float32)
