"""What libtpu schedules for the neural memory on TPUs that are not here.

The unit is bundles per position and head of whole grid steps and whole groups: what runs for every group, and for every
segment of groups. What runs once for a sequence or a document (the initial state, the last one) is left out. A bundle
takes a cycle where nothing stalls.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch import llo, schedules
from kernels_pallas import tuning
from kernels_pallas.neural_memory import neural_memory, steps

NAME = "neural_memory"
PARTS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """Of a call on packed rows [4, 4096, 16, 128] in bfloat16."""

    chunk: int
    widths: tuple[int, ...] = (128, 512, 128)
    batch: int = 4
    length: int = 4096
    heads: int = 16


CASES = {
    "chunk 16": Case(16),
    "chunk 64": Case(64),
    "chunk 16, depth 1": Case(16, (128, 128)),
}


def compile_case(case: Case, target: Any, chip: str) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    B, T, H, pairs = case.batch, case.length, case.heads, list(zip(case.widths, case.widths[1:]))
    rows = (of(B, T, H, case.widths[0], dtype=jnp.bfloat16),) * 3
    layers = tuple(of(1, H, i, o) for i, o in pairs)

    def loss(rows, gates, layers, positions):
        with tuning.device_kind(chip):
            y, *_ = neural_memory(
                *rows, *gates, weights=layers, momentum=layers, chunk=case.chunk, residual_norm=len(pairs) > 1,
                rates=(1.0,) * len(pairs), positions=positions,
            )  # fmt: skip
        return jnp.sum(y.astype(jnp.float32))

    arrays = rows, (of(B, T, H),) * 3, layers, of(B, T, dtype=jnp.int32)
    jax.jit(jax.grad(loss)).lower(*arrays).compile()


def facts(root: llo.Region, chip: str, heads: int, rows: int, segment: int) -> dict[str, Any]:
    """Of a kernel; "matrix": cycles that products take of the matrix units."""
    whole = schedules.grid(root)
    loops = [r for r in whole.walk() if r.kind == "loop" and r is not whole and r.total()["products"]]
    runs = lambda r: r.own["products"] > 0 or r in loops
    of_groups = [r for loop in loops for r in loop.walk() if runs(r)]
    inside = {id(r) for loop in loops for r in loop.walk()}
    once = lambda r: not r.inside and r.own["VST"] >= 64
    beside = [r for r in whole.walk() if id(r) not in inside and not once(r)]
    each = lambda name: sum(r.own[name] for r in of_groups) / (rows * heads)
    bundles = each("bundles") + sum(r.own["bundles"] for r in beside) / (segment * heads)
    return {
        "bundles": round(bundles, 3),
        "matrix": round(each("products") * llo.CYCLES[chip] / llo.UNITS[chip], 3),
        "spills": sum(r.own["SPILL"] for r in of_groups),
        "kernel_bundles": root.total()["bundles"],
    }


def measure(name: str, chip: str, folder: pathlib.Path, target: Any) -> dict[str, dict[str, Any]]:
    """Facts of both kernels of a case. The dump goes to `folder` (`llo.arguments`, before libtpu is loaded)."""
    case = CASES[name]
    llo.clear(folder)
    started = time.process_time()
    compile_case(case, target, chip)
    seconds = round(time.process_time() - started, 1)
    with tuning.device_kind(chip):
        blocks = steps(case.length, case.heads, case.widths, "bfloat16", case.chunk)
    found = {}
    for part in PARTS:
        (root,) = llo.kernels(folder, f"{NAME}_{part}", chip)
        found[part] = facts(root, chip, blocks[part]["heads"], blocks[part]["rows"], blocks[part]["segment"]) | {
            "vmem": llo.vmem(folder, f"{NAME}_{part}"),
            "blocks": blocks[part],
            "compile_cpu_seconds": seconds,
        }
    return found
