"""What libtpu schedules for the gated delta rule on TPUs that are not here: units as for the linear recurrence."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch.schedules_linear_recurrence import BATCH, HEADS, LENGTH, WIDTH, both
from kernels_pallas import tuning
from kernels_pallas.delta_rule import Sizes, default_sizes, delta_rule

NAME = "delta_rule"


@dataclasses.dataclass(frozen=True)
class Case:
    """Of a call; `channels`: each with a decay of its own."""

    packed: bool = False
    channels: bool = False


CASES = {
    "one document": Case(),
    "documents": Case(packed=True),
    "channels": Case(channels=True),
    "channels, documents": Case(packed=True, channels=True),
}


def compile_case(case: Case, target: Any, chip: str, sizes: Sizes) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows = BATCH, LENGTH, HEADS
    arrays = {name: of(*rows, WIDTH) for name in "qkv"}
    decays = (*rows, WIDTH) if case.channels else rows
    arrays |= {"log_decay": of(*decays, dtype=jnp.float32), "beta": of(*rows, dtype=jnp.float32)}
    starts = of(*rows[:2], dtype=jnp.int32) if case.packed else None

    def loss(arrays, starts):
        with tuning.device_kind(chip):
            o, _ = delta_rule(**arrays, starts=starts, sizes=sizes)
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower(arrays, starts).compile()


def measure(name: str, chip: str, folder: pathlib.Path, target: Any, sizes: Sizes | None = None):
    """See `both`, of a case."""
    case, of = CASES[name], jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), "bfloat16")
    sizes, kernel = sizes or default_sizes(of, of, chip, case.channels), NAME + "_channels" * case.channels
    return both(kernel, sizes, chip, folder, lambda: compile_case(case, target, chip, sizes))
