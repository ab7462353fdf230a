"""What libtpu schedules for cross-entropy's kernels on TPUs that are not here.

The unit is bundles per 1024 logits, of a whole step of the grid: what runs once for a tile of rows, or of columns, is
left out. A bundle takes a cycle where nothing stalls.
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
from kernels_pallas.cross_entropy import Sizes, cross_entropy, default_sizes

NAME = "cross_entropy"
ROWS, COLUMNS = 16384, 32768
CASES = {"width 2048": 2048, "width 512": 512}


def compile_case(width: int, target: Any, chip: str, sizes: Sizes) -> None:
    """Forward and backward for a chip, of an embedding in float32; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def loss(hidden, kernel, targets):
        with tuning.device_kind(chip):
            lse, logit = cross_entropy(hidden, kernel, targets, sizes=sizes)
        return jnp.sum(lse) - jnp.sum(logit)

    arrays = of(ROWS, width), of(width, COLUMNS, dtype="float32"), of(ROWS, dtype="int32")
    jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()


def facts(root: llo.Region, chip: str, logits: int) -> dict[str, Any]:
    """Of a kernel whose step has so many logits; parts of a tile that are gone through in a loop count as they run."""
    loop, unit = schedules.grid(root), logits / 1024
    once = [r for r in loop.walk() if r.kind == "when" and not r.inside and not r.own["products"]]

    def runs(region: llo.Region, what: str) -> int:
        inside = sum((r.trips or 1 if r.kind == "loop" else 1) * runs(r, what) for r in region.inside if r not in once)
        return region.own[what] + inside

    return {
        "bundles": round(runs(loop, "bundles") / unit, 3),
        "matrix": round(runs(loop, "products") * llo.CYCLES[chip] / llo.UNITS[chip] / unit, 3),
        "once": sum(r.own["bundles"] for r in once),
        "spills": loop.total()["SPILL"],
        "kernel_bundles": root.total()["bundles"],
    }


def measure(name: str, chip: str, folder: pathlib.Path, target: Any, sizes: Sizes | None = None):
    """Facts of both directions, by direction. The dump goes to `folder` (`llo.arguments`)."""
    sizes = sizes or default_sizes(ROWS, CASES[name], COLUMNS, 2, chip)
    llo.clear(folder)
    started = time.process_time()
    compile_case(CASES[name], target, chip, sizes)
    seconds = round(time.process_time() - started, 1)
    tiles = {"forward": sizes.rows * sizes.columns, "backward": sizes.backward_rows * sizes.backward_columns}
    found = {}
    for part, logits in tiles.items():
        (root,) = llo.kernels(folder, f"{NAME}_{part}", chip)
        found[part] = facts(root, chip, logits) | {
            "vmem": llo.vmem(folder, f"{NAME}_{part}"),
            "sizes": dataclasses.asdict(sizes),
            "compile_cpu_seconds": seconds,
        }
    return found
