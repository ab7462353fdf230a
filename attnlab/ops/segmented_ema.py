"""A first-order recurrence per channel, `h_t = a_t h_{t-1} + x_t`: the running averages of gated linear RNNs.

A decay of 0 begins a segment: what stood before it plays no part.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnlab.ops.dispatch import Implementation, Op
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class EmaSpec:
    """The static facts by which an implementation is chosen. Lengths as in `segmented_ema`."""

    batch: int
    positions: int
    sequences: int
    channels: int
    dtype: str

    def __str__(self) -> str:
        return f"B{self.batch} T{self.positions} R{self.sequences} C{self.channels} {self.dtype}"

    @classmethod
    def of(cls, exchange: SequenceParallel | None, decay, x, start) -> EmaSpec:
        """Of the arrays of a device."""
        return cls(*x.shape, str(x.dtype))


def definition(decay_BTC: jax.Array, x_BTRC: jax.Array, start_BRC: jax.Array) -> jax.Array:
    """The recurrence, position by position; see `segmented_ema`."""

    def step(h, inputs):
        decay, x = inputs
        h = decay[:, None] * h + x
        return h, h

    _, h = jax.lax.scan(step, start_BRC, (jnp.moveaxis(decay_BTC, 1, 0), jnp.moveaxis(x_BTRC, 1, 0)))
    return jnp.moveaxis(h, 0, 1)


@jax.custom_vjp
def in_blocks(decay_BTC: jax.Array, x_BTRC: jax.Array, start_BRC: jax.Array) -> jax.Array:
    """Within blocks, all at once, from zero; then over the ends of blocks; the two are added. The backward is the same
    recurrence from the last position to the first."""
    B, T, R, C = x_BTRC.shape
    if T == 1:
        return (decay_BTC[:, 0, None] * start_BRC + x_BTRC[:, 0])[:, None]
    size = 2 ** math.ceil(math.log2(T) / 2)

    def cut(x):
        """[size, B, N, ...]: filled up behind the last position, whence nothing comes back."""
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 2, 0)

    def within(carry, inputs):
        h, kept = carry
        decay, x = inputs
        h, kept = decay[:, :, None] * h + x, decay * kept
        return (h, kept), (h, kept)

    decays, inputs = cut(decay_BTC), cut(x_BTRC)
    zero = (jnp.zeros_like(inputs[0]), jnp.ones_like(decays[0]))
    (ends, kept_ends), (h, kept) = jax.lax.scan(within, zero, (decays, inputs))

    def across(before, inputs):
        end, kept = inputs
        return end + kept[:, None] * before, before

    _, before = jax.lax.scan(across, start_BRC, (jnp.moveaxis(ends, 1, 0), jnp.moveaxis(kept_ends, 1, 0)))
    h += kept[:, :, :, None] * jnp.moveaxis(before, 0, 1)
    return jnp.moveaxis(h, 0, 2).reshape(B, -1, R, C)[:, :T]


def _forward(decay, x, start):
    h = in_blocks(decay, x, start)
    return h, (decay, h, start)


def _backward(residuals, dh):
    decay, h, start = residuals
    # g_t = dh_t + a_{t+1} g_{t+1}, the gradient of h_t through all later positions, which is also that of x_t.
    later = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    g = in_blocks(later[:, ::-1], dh[:, ::-1], jnp.zeros_like(start))[:, ::-1]
    before = jnp.concatenate([start[:, None], h[:, :-1]], axis=1)
    return (g * before).sum(2), g, decay[:, 0, None] * g[:, 0]


in_blocks.defvjp(_forward, _backward)


def _over_devices(chosen: Implementation, exchange: SequenceParallel, decay, x, start):
    """Each device runs its positions from zero, and adds what is left of those before."""
    h, kept = chosen.run(decay, x, jnp.zeros_like(start)), jnp.cumprod(decay, axis=1)
    join = lambda before, own: own[0][:, None] * before + own[1]
    before, _ = exchange.exclusive_scan(join, (kept[:, -1], h[:, -1]), start)
    return h + kept[:, :, None] * before[:, None]


SEGMENTED_EMA = Op(
    "segmented_ema",
    EmaSpec.of,
    {"definition": Implementation(definition), "chunked": Implementation(in_blocks)},
    preference=("chunked",),
    split=_over_devices,
)


def segmented_ema(decay_BTC: jax.Array, x_BTRC: jax.Array, start_BRC: jax.Array, *, impl: str = "auto") -> jax.Array:
    """`h_t = a_t h_{t-1} + x_t` for all positions.

    Args:
      decay_BTC: a, between 0 and 1; R sequences share it.
      x_BTRC: what is added, already weighed.
      start_BRC: h before the first position.
      impl: "auto", or a name in `SEGMENTED_EMA.table`; "chunked" works in blocks of about sqrt(T) positions, 2 sqrt(T)
        steps instead of T.

    Returns:
      h_BTRC. All four are of one dtype, float32 or wider.
    """

    rows = ("batch", "seq", None, "heads")
    axes = (("batch", "seq", "heads"), rows, ("batch", None, "heads"))
    return SEGMENTED_EMA(decay_BTC, x_BTRC, start_BRC, axes=axes, out_axes=[rows], impl=impl)
