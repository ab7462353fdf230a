"""Conjugate gradients for many small systems at once, by products with the matrix only."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnlab.ops.blockwise import varying


@dataclasses.dataclass(frozen=True)
class Solver:
    """What is solved, and until when.

    Attributes:
      iterations: those that are counted, and run where there is no early exit.
      max_iterations: at most, where there is.
      tolerance: relative residual at which a system is done; None: `default_tolerance`.
      blocks: of channels, within which matrices have what they have.
    """

    iterations: int = 16
    max_iterations: int = 16
    tolerance: float | None = None
    blocks: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """Solutions of N systems.

    Attributes:
      x_Nd: what was found.
      residual_N: `|b - A x| / |b|` as the recurrence has it, 0 where b = 0.
      iterations_N: iterations that changed x, in the dtype of x.
    """

    x_Nd: jax.Array
    residual_N: jax.Array
    iterations_N: jax.Array


def default_tolerance(dtype: jnp.dtype) -> float:
    """Relative residual at which a solve in `dtype` is done: an implicit gradient is wrong by about as much."""
    return 1e-13 if jnp.finfo(dtype).bits == 64 else 1e-5


def conjugate_gradient(
    product: Callable[[jax.Array], jax.Array],
    b_Nd: jax.Array,
    *,
    iterations: int,
    tolerance: float | None = None,
    early_exit: bool = True,
) -> Solution:
    """Solves `A_n x_n = b_n` for symmetric positive definite `A_n`, from x = 0.

    A system is left as it is from the iteration on at which its residual is below `tolerance`, so that its solution
    depends neither on the others nor on how long they take. In exact arithmetic at most d iterations change anything.

    Args:
      product: y_Nd to `A_n y_n`, row by row.
      b_Nd: right-hand sides, float32 or float64; x is of the same type.
      iterations: at most.
      tolerance: of `|b - A x| / |b|`; None: `default_tolerance`.
      early_exit: stop when all systems are done. False: always `iterations` of them, a number known before the run.

    Source: Hestenes and Stiefel 1952, Methods of Conjugate Gradients for Solving Linear Systems, section 3.
    """
    tolerance = default_tolerance(b_Nd.dtype) if tolerance is None else tolerance
    dot = lambda a, b: (a * b).sum(-1)
    at_first_N = dot(b_Nd, b_Nd)
    enough_N = at_first_N * tolerance**2

    def iterate(carry):
        x, residual, direction, square, count = carry
        image = product(direction)
        curvature = dot(direction, image)
        # Rounding can make the curvature of a direction of almost no length zero or negative.
        live = (square > enough_N) & (curvature > 0)
        step = jnp.where(live, square / jnp.where(live, curvature, 1), 0)
        x += step[:, None] * direction
        residual -= step[:, None] * image
        new = dot(residual, residual)
        ratio = jnp.where(live, new / jnp.where(live, square, 1), 0)
        direction = jnp.where(live[:, None], residual + ratio[:, None] * direction, direction)
        return x, residual, direction, jnp.where(live, new, square), count + live

    carry = (jnp.zeros_like(b_Nd), b_Nd, b_Nd, at_first_N, jnp.zeros_like(at_first_N))
    carry = varying(carry, b_Nd)
    if early_exit:
        unfinished = lambda s: (s[0] < iterations) & jnp.any(s[1][3] > enough_N)
        _, carry = jax.lax.while_loop(unfinished, lambda s: (s[0] + 1, iterate(s[1])), (jnp.int32(0), carry))
    else:
        carry, _ = jax.lax.scan(lambda c, _: (iterate(c), None), carry, length=iterations)
    x, _, _, square, count = carry
    relative = jnp.sqrt(square / jnp.where(at_first_N > 0, at_first_N, 1))
    return Solution(x, relative, count)
