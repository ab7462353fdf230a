"""What cross-entropy is made of, a tile of logits at a time: they never leave the chip, nor on TPU do gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.cross_entropy import gpu, gpu_tiles
from kernels_pallas.cross_entropy import plan as plan_lib
from kernels_pallas.cross_entropy.gradient import statistics
from kernels_pallas.cross_entropy.plan import Plan, Sizes
from kernels_pallas.flash_attention.call import platform_of
from kernels_pallas.tuning import LANES

__all__ = ["Sizes", "cross_entropy", "default_sizes", "gpu_kernel_flops", "gpu_unsupported", "kernel_flops"]

gpu_unsupported = gpu.unsupported
_CHUNK = 8192


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    platform: str = "tpu",
    interpret: Any = False,
    sizes: Sizes | None = None,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Log-partitions and targets' logits of `hidden @ kernel`, on TPU and Hopper; cross-entropy is their difference.

    On TPU a forward that is differentiated sums the hidden states' gradient beside the log-partitions; one more pass
    makes the kernel's. Each is two products of every row with every column; without differentiation it is one. On
    Hopper the forward is one, the backward three, by chunks of the vocabulary.

    Args:
      hidden: [N, D], bfloat16 or, on TPU, float32.
      kernel: [D, V], of a floating dtype; products are of numbers in the dtype of `hidden`.
      targets: int [N], a column; one that there is not: the row has none.
      platform: whose kernels run, "tpu" or "cuda".
      interpret: runs the kernels as plain XLA operations on any platform, or, on a CPU, as its interpreter's parameters
        say (`jax.experimental.pallas.tpu.InterpretParams`). Hopper's run on a CPU, by jax's interpreter of GPU kernels.
      sizes: tiles on TPU; by default `default_sizes`.
      chunk: on Hopper, columns whose slopes, the gradient of their logits, are held at a time, [N, chunk] in the dtype
        of `hidden`; about, as chunks are of whole tiles and of one size.

    Returns:
      lse [N] and logit [N] in float32; logit is 0 for rows without a target. Both are differentiable (reverse mode) in
      hidden and kernel, whose gradients are of their dtypes and of float32 sums.

    Raises:
      ValueError: shapes, dtypes or tiles that do not fit.
    """
    _check(hidden, kernel, targets)
    (N, D), V = hidden.shape, kernel.shape[1]
    # Of a column that there is not, not even in a last tile's padding.
    targets = jnp.where((targets >= 0) & (targets < V), targets, -1).astype(jnp.int32)
    if platform_of("cross_entropy", platform, interpret, ("tpu", "cuda")) == "cuda":
        return _on_hopper(hidden, kernel, targets, interpret, sizes, chunk)
    kind = tuning.kind()
    sizes = default_sizes(N, D, V, hidden.dtype.itemsize, kind) if sizes is None else sizes
    if sizes is None:
        raise ValueError(f"cross_entropy: no tile of rows of width {D} fits into fast memory")
    for name, size in dataclasses.asdict(sizes).items():
        if size < LANES or size % LANES:
            raise ValueError(f"cross_entropy: {name}={size} is not allowed; allowed: multiples of {LANES}")
    wide = _padded(D)
    plan = Plan((N, wide, V), str(kernel.dtype), sizes, kind, interpret)
    hidden, kernel = jnp.pad(hidden, ((0, 0), (0, wide - D))), jnp.pad(kernel, ((0, wide - D), (0, 0)))
    return statistics(plan, hidden, kernel, targets)


def _on_hopper(hidden, kernel, targets, interpret, sizes, chunk) -> tuple[jax.Array, jax.Array]:
    if reason := gpu.unsupported(str(hidden.dtype)):
        raise ValueError(f"cross_entropy on cuda: {reason}")
    if sizes is not None:
        raise ValueError(f"cross_entropy on cuda: sizes={sizes}; allowed: None")
    if chunk < 1:
        raise ValueError(f"cross_entropy on cuda: chunk={chunk}; allowed: 1 or more")
    plan = gpu.Plan.of(kernel.shape[1], chunk, str(kernel.dtype), interpret)
    lse, logit = statistics(plan, *gpu.padded(plan, hidden, kernel, targets))
    return lse[: len(targets)], logit[: len(targets)]


def default_sizes(rows: int, width: int, columns: int, itemsize: int, kind: str) -> Sizes | None:
    """Tiles for such a call on devices of a kind; None: rows are too wide for the chip."""
    return plan_lib.sizes(rows, _padded(width), columns, itemsize, kind)


def kernel_flops(rows: int, width: int, columns: int) -> dict[str, float]:
    """FLOPs of one run of each kernel, by name."""
    each = 2.0 * rows * width * columns
    return {"cross_entropy_value": each, "cross_entropy_forward": 2 * each, "cross_entropy_backward": 2 * each}


def gpu_kernel_flops(rows: int, width: int, columns: int, chunk: int = _CHUNK) -> dict[str, float]:
    """As `kernel_flops`, of the kernels for Hopper: of the backward's, a chunk's."""
    whole = 2.0 * rows * width * columns
    return {gpu_tiles.VALUE: whole, gpu_tiles.SLOPES: whole / gpu.Plan.of(columns, chunk, "float32", False).chunks}


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
