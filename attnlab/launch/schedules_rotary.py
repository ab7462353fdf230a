"""What libtpu schedules for RoPE and QK-norm on TPUs that are not here: units as for the linear recurrence."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch import llo
from attnlab.launch.schedules import grid
from attnlab.launch.schedules_linear_recurrence import BATCH, HEADS, LENGTH, WIDTH
from kernels_pallas import tuning
from kernels_pallas.rotary import rotary, rows_of

NAME = "rotary"
CASES = {"alone": ("forward", "back"), "norm": ("forward", "backward")}  # the kernels of both directions


def compile_case(norm: bool, target: Any, chip: str) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {"x": of(BATCH, LENGTH, HEADS, WIDTH)} | ({"scale": of(WIDTH, dtype=jnp.float32)} if norm else {})
    pairs = of(BATCH, LENGTH, WIDTH // 2, dtype=jnp.float32)

    def loss(arrays, cos, sin):
        with tuning.device_kind(chip):
            y = rotary(cos=cos, sin=sin, **arrays)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    jax.jit(jax.grad(loss)).lower(arrays, pairs, pairs).compile()


def measure(name: str, chip: str, folder: pathlib.Path, target: Any) -> dict[str, dict[str, Any]]:
    """Facts of both kernels of a case. The dump goes to `folder` (`llo.arguments`, before libtpu is loaded)."""
    rows, found = rows_of(LENGTH, HEADS, WIDTH, 2, chip), {}
    llo.clear(folder)
    started = time.process_time()
    compile_case(name == "norm", target, chip)
    seconds = round(time.process_time() - started, 1)
    for part in CASES[name]:
        (root,) = llo.kernels(folder, f"{NAME}_{part}", chip)
        total = grid(root).total()
        found[part] = {
            "bundles": round(total["bundles"] / (rows * HEADS), 3),
            "matrix": 0.0,
            "spills": total["SPILL"],
            "kernel_bundles": root.total()["bundles"],
            "vmem": llo.vmem(folder, f"{NAME}_{part}"),
            "rows": rows,
            "compile_cpu_seconds": seconds,
        }
    return found
