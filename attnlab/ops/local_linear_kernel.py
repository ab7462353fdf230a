"""Local linear attention by our kernels (`kernels_pallas.local_linear_attention`), for TPU and Hopper: any mask of
intervals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import attention_flash
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.conjugate_gradient import Solver, default_tolerance
from attnlab.ops.masks import Mask
from attnlab.parallel import partition
from kernels_pallas import tuning


@dataclasses.dataclass(frozen=True)
class LocalLinearSpec(AttentionSpec):
    """Of attention, and of the solver: iterations that are counted, and blocks of channels."""

    iterations: int = 16
    blocks: int = 1

    def __str__(self) -> str:
        return super().__str__() + (f" blocks={self.blocks}" if self.blocks > 1 else "")

    @classmethod
    def of(cls, exchange: Any, *arrays: Any, solver: Solver, **facts: Any) -> LocalLinearSpec:
        """Of the arrays of `attend`, and what else the op has."""
        found = super().of(exchange, *arrays, **facts)
        return dataclasses.replace(found, iterations=solver.iterations, blocks=solver.blocks)


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import local_linear_attention

    return local_linear_attention


def unsupported(spec: LocalLinearSpec) -> str | None:
    """Why the kernels cannot serve, or None."""
    if spec.blocks > 1:
        return f"it keeps all second moments, not those within blocks={spec.blocks}"
    if partition.platform() == "gpu":
        widest = max(spec.width, spec.value_width)
        return _kernels().gpu_unsupported(spec.dtype, widest) or attention_flash.not_hopper()
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    with tuning.device_kind(partition.device_kind()):
        most = _kernels().most_keys(tuning.kind(), spec.width, spec.value_width, jnp.dtype(spec.dtype).itemsize)
    return f"fast memory has room for {most} keys, not {spec.keys}" if spec.keys > most else None


def worth(spec: LocalLinearSpec) -> bool:
    """Whether "auto" takes it: not for less than a tile."""
    return min(spec.queries, spec.keys) >= tuning.LANES


def kernel_flops(spec: LocalLinearSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel with `iterations` iterations; pairs as for attention.

    Each product counts once, also those of bfloat16 inputs that are made in two passes (`kernels_pallas`).
    """
    of = _kernels().gpu_kernel_widths if partition.platform() == "gpu" else _kernels().kernel_widths
    widths = of(spec.iterations, spec.width, spec.value_width)
    return {name: attention_flash.pair_flops(spec) * width for name, width in widths.items()}


def local_linear(
    q_BTHd: jax.Array,
    ridge_BTH: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    mask: Mask,
    *,
    scale: float,
    solver: Solver,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `attnlab.ops.local_linear.local_linear`; `interpret` runs the TPU's as plain XLA, on any platform.

    As `cg`, a tile of rows goes on until all its rows have a residual of `tolerance`, for at most `max_iterations`. All
    numbers are float32 but for what products of bfloat16 inputs take: directions of the solver, rounded before anything
    is made of them, and weights of values and gradients, while sums of keys get theirs as two bfloat16 numbers. The
    output and the solutions carry the checkpoint name "attention_o".
    """
    T, S = q_BTHd.shape[1], k_BSKd.shape[1]
    starts, ends = mask.bounds(T, S)
    tolerance = default_tolerance(jnp.dtype("float32")) if solver.tolerance is None else solver.tolerance
    with tuning.device_kind(partition.device_kind()):
        found = _kernels().local_linear_attention(
            q_BTHd, ridge_BTH.astype(jnp.float32), k_BSKd, v_BSKe,
            starts=starts, ends=ends, scale=scale, iterations=solver.max_iterations, tolerance=tolerance,
            platform=attention_flash.kernel_platform(), interpret=interpret,
            keys_seen=attention_flash.own_keys_seen(mask, T, S),
        )  # fmt: skip
    return found.o, found.residual, found.iterations
