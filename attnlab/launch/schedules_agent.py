"""What libtpu schedules for causal agent attention on TPUs that are not here: units as for the linear recurrence.

What is done again where logits differ too much for one sweep is beside the step: loops in a branch.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch import llo
from attnlab.launch.schedules_linear_recurrence import BATCH, HEADS, LENGTH, PARTS, WIDTH
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


def facts(root: llo.Region, chip: str, work: int) -> dict[str, Any]:
    """Of a kernel whose step is `work` positions times heads; "again": bundles of a block that is done again."""
    grid = max((r for r in root.inside if r.kind == "loop"), key=lambda r: r.total()["bundles"])
    within = lambda r, others: any(o is not r and o.start <= r.start and r.end <= o.end for o in others)
    loops = [r for r in grid.walk() if r.kind == "loop" and r is not grid]
    again = [r for r in loops if not within(r, loops)]
    once = [r for r in grid.walk() if r.kind == "when" and not r.inside and r.own["VST"] > 16 and not within(r, again)]
    count = lambda name, regions: sum(r.total()[name] for r in regions)
    left = lambda name: grid.total()[name] - count(name, again) - count(name, once)
    return {
        "bundles": round(left("bundles") / work, 3),
        "matrix": round(left("products") * llo.CYCLES[chip] / llo.UNITS[chip] / work, 3),
        "once": count("bundles", once),
        "again": count("bundles", again),
        "spills": left("SPILL"),
        "kernel_bundles": root.total()["bundles"],
    }


def measure(name: str, chip: str, folder: pathlib.Path, target: Any, sizes: Sizes | None = None):
    """Facts of a case's two directions, by direction. The dump goes to `folder` (`llo.arguments`)."""
    case, of = CASES[name], jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), "bfloat16")
    sizes = sizes or default_sizes(of, of, case.agents, chip)
    llo.clear(folder)
    started = time.process_time()
    compile_case(case, target, chip, sizes)
    seconds = round(time.process_time() - started, 1)
    found = {}
    for part, heads in zip(PARTS, (sizes.forward_heads, sizes.backward_heads)):
        (root,) = llo.kernels(folder, f"{NAME}_{part}", chip)
        found[part] = facts(root, chip, sizes.chunk * sizes.chunks * heads) | {
            "vmem": llo.vmem(folder, f"{NAME}_{part}"),
            "sizes": dataclasses.asdict(sizes),
            "compile_cpu_seconds": seconds,
        }
    return found
