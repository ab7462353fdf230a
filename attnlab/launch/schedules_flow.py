"""What libtpu schedules for flow attention on TPUs that are not here.

The unit is bundles per position and head, of a whole step of the grid; what runs once for a sequence (the first step's
tables, the last step's state) is left out. A bundle takes a cycle where nothing stalls.
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
from kernels_pallas import tuning
from kernels_pallas.flow_attention import Blocks, flow_attention

NAME = "flow_attention"
PARTS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """Of a call on [batch, length, heads, width]."""

    packed: bool = False
    length: int = 4096
    batch: int = 4
    heads: int = 16
    width: int = 128


CASES = {"plain": Case(), "documents": Case(packed=True)}


def compile_case(case: Case, target: Any, chip: str, blocks: Blocks) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    B, T, H, d = case.batch, case.length, case.heads, case.width
    x = of(B, T, H, d, dtype=jnp.bfloat16)
    fixed = {"documents": of(B, T, dtype=jnp.int32)} if case.packed else {}

    def loss(arrays, fixed):
        with tuning.device_kind(chip):
            o, _, _ = flow_attention(*arrays, **fixed, blocks=blocks)
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower((x, x, x), fixed).compile()


def facts(root: llo.Region, chip: str, work: int) -> dict[str, Any]:
    """Of a kernel whose step is `work` positions times heads; "matrix": cycles that products take the matrix units."""
    loop = max((r for r in root.inside if r.kind == "loop"), key=lambda r: r.total()["bundles"])
    total = loop.total()
    once = sum(r.own["bundles"] for r in loop.walk() if not r.inside and not r.own["products"] and r.own["VST"] >= 64)
    return {
        "bundles": round((total["bundles"] - once) / work, 3),
        "matrix": round(total["products"] * llo.CYCLES[chip] / llo.UNITS[chip] / work, 3),
        "spills": total["SPILL"],
        "kernel_bundles": root.total()["bundles"],
    }


def measure(
    name: str, chip: str, folder: pathlib.Path, target: Any, blocks: Blocks | None = None
) -> dict[str, dict[str, Any]]:
    """Facts of both kernels of a case, by part. The dump goes to `folder` (`llo.arguments`), as libtpu was told."""
    blocks = blocks or Blocks()
    llo.clear(folder)
    started = time.process_time()
    compile_case(CASES[name], target, chip, blocks)
    seconds = round(time.process_time() - started, 1)
    found = {}
    for part in PARTS:
        (root,) = llo.kernels(folder, f"flow_{part}", chip)
        found[part] = facts(root, chip, blocks.chunk * blocks.chunks * blocks.heads) | {
            "vmem": llo.vmem(folder, f"flow_{part}"),
            "blocks": dataclasses.asdict(blocks),
            "compile_cpu_seconds": seconds,
        }
    return found
