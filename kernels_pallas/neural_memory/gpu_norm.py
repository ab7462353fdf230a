"""The memory's norm on Hopper, where a warpgroup has whole rows of its outputs: heads of 64.

The memory says `k + x`, `x = (z - mean z) / deviation`, and `e = k + x - v`. With J the derivative of x by z, which is
symmetric, the loss' gradient at z is `J e`, and its derivative by z, `slopes`, is symmetric as well.

Rows of all arrays are positions [64, 64]; `inverse` is 1 / deviation, of each row [64].
"""

from __future__ import annotations

import jax

from kernels_pallas.hopper import by_row


def _mean(x: jax.Array) -> jax.Array:
    return by_row(x.sum(axis=1) * (1.0 / x.shape[1]), x.shape)


def normalized(z: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x, and `inverse`."""
    centred = z - _mean(z)
    inverse = jax.lax.rsqrt((centred * centred).sum(axis=1) * (1.0 / z.shape[1]) + epsilon)
    return centred * by_row(inverse, z.shape), inverse


def pulled(x: jax.Array, inverse: jax.Array, u: jax.Array) -> jax.Array:
    """J u."""
    return by_row(inverse, u.shape) * (u - _mean(u) - x * _mean(x * u))


def slopes(x: jax.Array, inverse: jax.Array, e: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`J u`, and the derivative of `J e` along u, of which e is a function as x is."""
    inverse, of_x = by_row(inverse, u.shape), _mean(e * x)
    along = _mean(x * u)
    w = inverse * (u - _mean(u) - x * along)
    error = inverse * (e - _mean(e) - x * of_x)
    return w, inverse * (w - w * of_x - x * (_mean(w * x) + _mean(w * e)) - along * error)
