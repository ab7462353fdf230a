"""The inverse of a unit lower triangular matrix inside a kernel, by products alone."""

from __future__ import annotations

from collections.abc import Generator

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.linear_recurrence.chunk import iota
from kernels_pallas.mosaic import product

_BASE = 8  # blocks of so many rows by a power series: powers of larger ones are huge, and cancel


def unit_lower_inverse(lower: jax.Array, dtype: jnp.dtype) -> Generator[None, None, jax.Array]:
    """`(I + L)^-1` [C, C] in float32, L what is below the diagonal of `lower`; C is 8 times a power of two.

    Blocks on the diagonal are `(I - L)(I + L^2)(I + L^4)`, all at once. Neighbours are joined two by two, for which
    only rows of the second of each two are made: X_21 = -X_22 L_21 X_11. Products are of numbers in `dtype`. Yields
    between products.
    """
    C = lower.shape[0]
    row, col = iota((C, C), 0), iota((C, C), 1)
    same = lax.shift_right_logical(row ^ col, _BASE.bit_length() - 1) == 0
    diagonal = jnp.where(same & (row > col), lower, 0)
    inverse = jnp.where(row == col, 1.0, 0.0) - diagonal
    power = diagonal.astype(dtype)
    square = product(power, power, 1, 0)
    yield
    power = square.astype(dtype)
    both = product(jnp.concatenate([power, inverse.astype(dtype)]), power, 1, 0)
    inverse += both[C:]
    yield
    inverse = (inverse + product(inverse.astype(dtype), both[:C].astype(dtype), 1, 0)).astype(dtype)
    yield
    size = _BASE
    while size < C:
        second = lambda x: _second_of_two(x, size)
        row, col = iota((C // 2, C), 0), iota((C // 2, C), 1)
        shift = size.bit_length() - 1
        below = lax.shift_right_logical(col, shift) == 2 * lax.shift_right_logical(row, shift)
        passed = product(jnp.where(below, second(lower), 0).astype(dtype), inverse, 1, 0)
        yield
        own = second(inverse)
        narrow = passed.astype(dtype) if size > _BASE else passed
        joined = own - product(own, _spread(narrow, size).astype(dtype), 1, 0).astype(dtype)
        inverse = _interleaved(inverse, joined, size)
        yield
        size *= 2
    return inverse


def _second_of_two(x: jax.Array, size: int) -> jax.Array:
    """Of blocks of `size` rows those with odd numbers."""
    return jnp.concatenate([x[i : i + size] for i in range(size, x.shape[0], 2 * size)])


def _spread(x: jax.Array, size: int) -> jax.Array:
    """The opposite, zeros between."""
    zeros = jnp.zeros((size, x.shape[1]), x.dtype)
    return jnp.concatenate([part for i in range(0, x.shape[0], size) for part in (zeros, x[i : i + size])])


def _interleaved(x: jax.Array, second: jax.Array, size: int) -> jax.Array:
    """`x` with its odd blocks of rows replaced."""
    first = (x[i : i + size] for i in range(0, x.shape[0], 2 * size))
    odd = (second[i : i + size] for i in range(0, second.shape[0], size))
    return jnp.concatenate([part for two in zip(first, odd) for part in two])
