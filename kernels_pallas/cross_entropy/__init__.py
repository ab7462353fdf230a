"""What cross-entropy is made of, a tile of logits at a time: they never leave the chip, nor do their gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.cross_entropy import plan as plan_lib
from kernels_pallas.cross_entropy.gradient import statistics
from kernels_pallas.cross_entropy.plan import Plan, Sizes
from kernels_pallas.tuning import LANES

__all__ = ["Sizes", "cross_entropy", "default_sizes", "kernel_flops"]


def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, interpret: Any = False, sizes: Sizes | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-partitions and targets' logits of `hidden @ kernel`, on TPU; cross-entropy is their difference.

    A forward that is differentiated sums the hidden states' gradient beside the log-partitions; one more pass makes the
    kernel's. Each is two products of every row with every column; without differentiation it is one.

    Args:
      hidden: [N, D], bfloat16 or float32.
      kernel: [D, V], of a floating dtype; products are of numbers in the dtype of `hidden`.
      targets: int [N], a column; one that there is not: the row has none.
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`).
      sizes: tiles; by default `default_sizes`.

    Returns:
      lse [N] and logit [N] in float32; logit is 0 for rows without a target. Both are differentiable (reverse mode) in
      hidden and kernel, whose gradients are of their dtypes and of float32 sums.

    Raises:
      ValueError: shapes, dtypes or tiles that do not fit.
    """
    _check(hidden, kernel, targets)
    (N, D), V, kind = hidden.shape, kernel.shape[1], tuning.kind()
    sizes = default_sizes(N, D, V, hidden.dtype.itemsize, kind) if sizes is None else sizes
    if sizes is None:
        raise ValueError(f"cross_entropy: no tile of rows of width {D} fits into fast memory")
    for name, size in dataclasses.asdict(sizes).items():
        if size < LANES or size % LANES:
            raise ValueError(f"cross_entropy: {name}={size} is not allowed; allowed: multiples of {LANES}")
    wide = _padded(D)
    plan = Plan((N, wide, V), str(kernel.dtype), sizes, kind, interpret)
    hidden, kernel = jnp.pad(hidden, ((0, 0), (0, wide - D))), jnp.pad(kernel, ((0, wide - D), (0, 0)))
    # Of a column that there is not, not even in a last tile's padding.
    targets = jnp.where((targets >= 0) & (targets < V), targets, -1).astype(jnp.int32)
    return statistics(plan, hidden, kernel, targets)


def default_sizes(rows: int, width: int, columns: int, itemsize: int, kind: str) -> Sizes | None:
    """Tiles for such a call on devices of a kind; None: rows are too wide for the chip."""
    return plan_lib.sizes(rows, _padded(width), columns, itemsize, kind)


def kernel_flops(rows: int, width: int, columns: int) -> dict[str, float]:
    """FLOPs of one run of each kernel, by name."""
    each = 2.0 * rows * width * columns
    return {"cross_entropy_value": each, "cross_entropy_forward": 2 * each, "cross_entropy_backward": 2 * each}


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _check(hidden, kernel, targets) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"cross_entropy: {what}")

    fits = hidden.ndim == kernel.ndim == 2 and hidden.shape[1] == kernel.shape[0] and targets.shape == hidden.shape[:1]
    shapes = f"hidden {hidden.shape}, kernel {kernel.shape}, targets {targets.shape}"
    need(fits, f"{shapes} do not fit; expected hidden [N, D], kernel [D, V], targets [N]")
    need(min(*hidden.shape, kernel.shape[1]) > 0, f"{shapes}; no size may be 0")
    need(hidden.dtype in ("bfloat16", "float32"), f"hidden is {hidden.dtype}; allowed: bfloat16, float32")
    need(jnp.issubdtype(kernel.dtype, jnp.floating), f"kernel is {kernel.dtype}; allowed: a floating dtype")
    need(targets.dtype.kind == "i", f"targets are {targets.dtype}; expected signed integers")
