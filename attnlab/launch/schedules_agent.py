"""What libtpu schedules for causal agent attention on TPUs that are not here: units as for the linear recurrence.

What is done again where logits differ too much for one sweep is beside the step: loops in a branch.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch.schedules_linear_recurrence import BATCH, HEADS, LENGTH, WIDTH, both
from kernels_pallas import tuning
from kernels_pallas.agent_attention import Sizes, agent_attention, default_sizes

NAME = "agent_attention"


@dataclasses.dataclass(frozen=True)
class Case:
    """Of a call."""

    agents: int = 16
    packed: bool = False


CASES = {"16 agents": Case(), "16 agents, documents": Case(packed=True), "64 agents": Case(64)}


def compile_case(case: Case, target: Any, chip: str, sizes: Sizes) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows = BATCH, LENGTH, HEADS
    arrays = {name: of(*rows, WIDTH) for name in "qkv"} | {"agents": of(HEADS, case.agents, WIDTH)}
    starts = of(*rows[:2], dtype=jnp.int32) if case.packed else None

    def loss(arrays, starts):
        with tuning.device_kind(chip):
            o, _ = agent_attention(**arrays, starts=starts, sizes=sizes)
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower(arrays, starts).compile()


def measure(name: str, chip: str, folder: pathlib.Path, target: Any, sizes: Sizes | None = None):
    """See `both`, of a case."""
    case, of = CASES[name], jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), "bfloat16")
    sizes = sizes or default_sizes(of, of, case.agents, chip)
    return both(NAME, sizes, chip, folder, lambda: compile_case(case, target, chip, sizes))
