"""What the TPU kernels are written in: arrays by name, the call itself, and products. `hopper` is this for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat


def product(a, b, a_axis: int, b_axis: int):
    """The product of two matrices over an axis of each, in float32; in full float32 where they are."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


class Slots:
    """Inputs, outputs and scratch of a kernel by name, in the order in which a kernel gets them."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
        self.outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        self.scratches: dict[str, Any] = {}

    def input(self, name: str, array: jax.Array, spec: pl.BlockSpec) -> None:
        self.inputs[name] = array, spec

    def output(self, name: str, shape: tuple[int, ...], dtype: Any, spec: pl.BlockSpec) -> None:
        self.outputs[name] = jax.ShapeDtypeStruct(shape, dtype), spec

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any = jnp.float32) -> None:
        self.scratches[name] = pltpu.VMEM(shape, dtype)

    def names(self) -> tuple[str, ...]:
        return *self.inputs, *self.outputs, *self.scratches

    def call(
        self,
        kernel: Callable[..., None],
        *scalars: jax.Array,
        grid: tuple[int, ...],
        semantics: tuple[str, ...],
        name: str,
        scope: str,
        vmem: int | None,
        interpret: Any,
        checked: bool = False,
        cost: pl.CostEstimate | None = None,
    ) -> dict[str, jax.Array]:
        """The outputs of `kernel(*scalars, *refs)`, by name.

        Args:
          scalars: in scalar memory before the grid begins.
          semantics: of the grid's axes.
          scope: around the kernel, whose own name else gets those of jax's transformations.
          vmem: bytes of fast memory that it may use; None: the compiler's default.
          interpret: as in the public functions.
          checked: whether the device checks where windows are; the grid alone says so where no data do.
        """
        run = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[spec for _, spec in self.inputs.values()],
                out_specs=[spec for _, spec in self.outputs.values()],
                scratch_shapes=list(self.scratches.values()),
            ),
            out_shape=[shape for shape, _ in self.outputs.values()],
            compiler_params=compat.tpu_params(
                dimension_semantics=semantics, vmem_limit_bytes=vmem, disable_bounds_checks=not checked
            ),
            cost_estimate=cost,
            name=name,
            interpret=interpret,
        )
        with jax.named_scope(scope):
            out = run(*scalars, *(x for x, _ in self.inputs.values()))
        return dict(zip(self.outputs, out, strict=True))
