"""The memory of a Titans layer: from activations to what the op takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Fused, Role, drawn, normal, param
from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.memory_frame import MemorySpec, MemoryState, initial_state
from attnlab.ops.norm import unit
from attnlab.ops.two_stage import log_gate

_ALPHA_BIAS = -4.0  # forgets about a fiftieth per position at first


class Memory(nnx.Module):
    """Projections, convolution and gates of the memory, and its initial weights.

    Args:
      config: a `TitansConfig`.
      fan_in: width of what it is fed.
      axes: logical axes of the projections' kernels.
      head_dim: width d of a head.
    """

    def __init__(self, config: Any, fan_in: int, axes: tuple[str, str], head_dim: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.head_dim, self.spec = config, head_dim, memory_spec(config, head_dim)
        wide, heads = param_dtype(dtype), config.heads
        qkv = Fused(tuple((name, head_dim) for name in "qkv"), groups=heads)
        self.qkv = Linear(fan_in, qkv.width, axes, rngs=rngs, dtype=dtype, fused=qkv, bias=config.bias != "none")
        if config.conv:
            args = ((config.conv, qkv.width), wide, config.conv**-0.5)
            self.kernel = drawn(rngs, normal, *args, axes=("conv", "heads"), role=Role.TAPS)
        bias = {"alpha": _ALPHA_BIAS} if config.forgetting else {}
        bias |= {"eta": 0.0} if config.momentum else {}
        bias |= {"theta": 0.0}
        gates = Fused(tuple((name, 1) for name in bias), groups=heads)
        self.gates = Linear(fan_in, gates.width, (axes[0], "gates"), rngs=rngs, dtype=wide, fused=gates)
        rows = jnp.tile(jnp.asarray(list(bias.values()), wide), (heads, 1))
        self.gate_bias = param(rows, axes=("heads", "gates"), role=Role.BIAS)
        for index, (fan, out) in enumerate(layer_widths(config, head_dim)):
            # The first layer of a network reads keys of length 1, the others entries of about 1.
            scale = 1.0 if index == 0 and config.depth > 1 else fan**-0.5
            axes, args = ("heads", "memory_in", "memory_out"), ((heads, fan, out), wide, scale)
            setattr(self, f"layer_{index}", drawn(rngs, normal, *args, axes=axes, role=Role.MEMORY))
        if config.norm_scale:
            gain = jnp.zeros((heads, 1, head_dim), wide)
            self.norm_gain = param(gain, axes=("heads", "memory_in", "memory_out"), role=Role.MEMORY)

    def initial(self) -> MemoryState:
        """Where every document begins; rows [1, ...]."""
        layers = [getattr(self, f"layer_{index}") for index in range(self.config.depth)]
        if self.config.norm_scale:
            layers.append(self.norm_gain)
        return initial_state(tuple(layer[...] for layer in layers), 1, self.config.momentum)

    def blank(self, batch: int) -> MemoryState:
        """The state of a stream of which nothing has been seen: its first position begins a document."""
        wide, heads = self.gates.dtype, self.config.heads
        shapes = layer_widths(self.config, self.head_dim)
        if self.config.norm_scale:
            shapes.append((1, self.head_dim))
        return initial_state(tuple(jnp.zeros((heads, *s), wide) for s in shapes), batch, self.config.momentum)

    def tail(self, batch: int, dtype: Any) -> jax.Array:
        """The convolution's inputs [B, J, 3 H d] before a document."""
        return jnp.zeros((batch, max(self.config.conv - 1, 0), 3 * self.config.heads * self.head_dim), dtype)

    def inputs(
        self, x: jax.Array, documents: jax.Array | None, tail: jax.Array | None, padding: jax.Array | None
    ) -> tuple[tuple, jax.Array | None]:
        """q, k, v, log_keep, log_eta, theta of `neural_memory` for x [B, T, fan_in], and the tail after.

        Args:
          padding: bool [B, T], positions that write nothing; None: there are none.
        """
        projected = self.qkv(x)
        if self.config.conv:
            convolved, tail = causal_conv(projected, self.kernel[...], documents, tail)
            return self.gated(x, convolved, padding), tail
        return self.gated(x, projected, padding), tail

    def gated(self, x: jax.Array, convolved: jax.Array, padding: jax.Array | None) -> tuple:
        """`inputs`, from the convolution's outputs [B, T, 3 H d]."""
        c = self.config
        shape = (*x.shape[:2], c.heads, -1)
        q, k, v = jnp.split(jax.nn.silu(convolved).reshape(shape), 3, axis=-1)
        logits = self.gates(x).reshape(shape) + self.gate_bias[...]
        gates = list(jnp.moveaxis(logits, -1, 0))
        log_keep = log_gate(-gates.pop(0)) if c.forgetting else None
        log_eta = log_gate(gates.pop(0)) if c.momentum else None
        theta = c.theta_max * jax.nn.sigmoid(gates.pop())
        if c.stability == "bound":
            # sum_i H_{t,i} (1 - eta_i) = 1 - eta_1 ... eta_t, and kappa adds up to `chunk` rows of H.
            theta = theta / c.chunk * (1.0 if log_eta is None else -jnp.expm1(log_eta))
        if padding is not None:
            theta = jnp.where(padding[..., None], 0, theta)
            v = jnp.where(padding[..., None, None], 0, v)
        return unit(q), unit(k), v, log_keep, log_eta, theta


def layer_widths(config: Any, head_dim: int) -> list[tuple[int, int]]:
    """Widths in and out of each of the memory's layers."""
    hidden = [config.expansion * head_dim] * (config.depth - 1)
    widths = [head_dim, *hidden, head_dim]
    return list(zip(widths[:-1], widths[1:]))


def memory_spec(config: Any, head_dim: int) -> MemorySpec:
    """The op's description of the memory."""
    widths, learn = layer_widths(config, head_dim), config.depth + config.norm_scale
    rates = (1.0,) * learn
    if config.stability == "bound":
        # A layer's step changes its output by theta times the squared length of its input: 1 for the keys, and
        # about their number for hidden activations; the norm's scale, by the square of a normed entry, 1 on average.
        # The changes add up.
        rates = tuple(1 / (learn * (fan if index else 1)) for index, (fan, _) in enumerate(widths))
        rates += (1 / learn,) * config.norm_scale
    return MemorySpec(
        config.chunk,
        config.normed,
        rates,
        config.grad_at,
        config.read_after_write,
        config.activation,
        config.norm_scale,
        config.norm_epsilon,
    )


def memory_flops(config: Any, head_dim: int, length: int) -> float:
    """Matrix-product FLOPs of the chunked op per position, all heads, on one unpadded document of `length`."""
    chunk = min(config.chunk, length)
    padded = -(-length // chunk) * chunk / length
    stages = 1 + config.momentum
    per_head = 2.0 * chunk**2 if config.momentum else 0.0  # kappa
    for index, (fan, out) in enumerate(layer_widths(config, head_dim)):
        evaluated = 1 + stages + (index > 0)  # on keys, on queries, back through it
        per_head += 2.0 * fan * out * (evaluated + stages) + 2.0 * chunk * (fan + out)
    if config.norm_scale:
        per_head += 4.0 * head_dim * stages + 2.0 * chunk * (1 + head_dim)
    return padded * config.heads * per_head
