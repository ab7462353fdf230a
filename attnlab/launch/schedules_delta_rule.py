"""What libtpu schedules for the gated delta rule on TPUs that are not here: units as for the linear recurrence."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch.schedules_linear_recurrence import BATCH, HEADS, LENGTH, WIDTH, both
from kernels_pallas import tuning
from kernels_pallas.delta_rule import Sizes, default_sizes, delta_rule

NAME = "delta_rule"
CASES = {"one document": False, "documents": True}


def compile_case(packed: bool, target: Any, chip: str, sizes: Sizes) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows = BATCH, LENGTH, HEADS
    arrays = {name: of(*rows, WIDTH) for name in "qkv"}
    arrays |= {name: of(*rows, dtype=jnp.float32) for name in ("log_decay", "beta")}
    starts = of(*rows[:2], dtype=jnp.int32) if packed else None

    def loss(arrays, starts):
        with tuning.device_kind(chip):
            o, _ = delta_rule(**arrays, starts=starts, sizes=sizes)
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower(arrays, starts).compile()


def measure(name: str, chip: str, folder: pathlib.Path, target: Any, sizes: Sizes | None = None):
    """See `both`, of a case."""
    of = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), "bfloat16")
    sizes = sizes or default_sizes(of, of, chip)
    return both(NAME, sizes, chip, folder, lambda: compile_case(CASES[name], target, chip, sizes))
