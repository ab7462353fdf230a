"""What libtpu schedules for local linear attention on TPUs that are not here.

The unit is bundles per 1024 scores: of an iteration of conjugate gradients, in its loop over key tiles ("bundles"), and
of all other passes over keys together ("passes": statistics, weights, right side, output, gradients). "once" is what an
iteration has beside that loop, in bundles: the first scores, the last tile, and the step. A bundle takes a cycle where
nothing stalls. Estimates are of a causal head and 16 iterations; of a block of code its bundles count, or what its
products occupy the matrix units if that is more.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch import llo
from kernels_pallas import tuning
from kernels_pallas.local_linear_attention import Blocks, default_blocks, local_linear_attention

NAME = "local_linear"
PARTS = ("forward", "backward")
ITERATIONS = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """Of a call on [batch, length, heads, width], causal."""

    batch: int = 16
    length: int = 4096
    heads: int = 4
    width: int = 128


CASES = {"causal": Case()}


def compile_case(case: Case, target: Any, chip: str, blocks: Blocks | None) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows = case.batch, case.length, case.heads
    x = of(*rows, case.width, dtype=jnp.bfloat16)
    ends = of(1, case.length, dtype=jnp.int32)

    def loss(arrays, ends):
        with tuning.device_kind(chip):
            o = local_linear_attention(*arrays, ends=ends, iterations=ITERATIONS, blocks=blocks).o
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower((x, of(*rows, dtype=jnp.float32), x, x), ends).compile()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A pass over key tiles that asks for the next while it finishes one, as regions of code.

    Attributes:
      opening: asks for the first tile; the others are in it.
      turn: two tiles, in a loop.
      odd: the last of an odd number.
    """

    opening: llo.Region
    turn: llo.Region
    odd: llo.Region

    @classmethod
    def of(cls, region: llo.Region) -> Sweep | None:
        """Of a region that is one, else None."""
        turns = [r for inner in region.inside for r in inner.walk() if r.kind == "loop" and r.own["products"]]
        if not region.own["products"] or not turns:
            return None
        (odd,) = (r for r in region.inside if r.kind == "when" and r.own["products"])
        return cls(region, turns[0], odd)

    def cycles(self, tiles: int, cost: Callable[[llo.Region], float]) -> float:
        """Of so many tiles, at least one."""
        return cost(self.opening) + tiles // 2 * cost(self.turn) + tiles % 2 * cost(self.odd)


def facts(root: llo.Region, chip: str, blocks: Blocks, length: int) -> dict[str, Any]:
    """Of one kernel."""
    matrix = lambda r: r.own["products"] * llo.CYCLES[chip] / llo.UNITS[chip]
    cost = lambda r: max(r.own["bundles"], matrix(r))
    steps = max((r for r in root.inside if r.kind == "loop"), key=lambda r: r.total()["bundles"])
    loops = [r for r in steps.walk() if r.kind == "loop" and r is not steps]
    found = {id(r): sweep for r in steps.walk() if (sweep := Sweep.of(r))}
    solver = next(r for r in loops if any(id(inner) in found for inner in r.walk()))
    inner = next(found[id(r)] for r in solver.walk() if id(r) in found)
    step = solver.total()["bundles"] - inner.opening.total()["bundles"]
    others = [sweep for sweep in found.values() if sweep is not inner]
    turns = {id(sweep.turn) for sweep in found.values()}
    plain = [r for r in loops if r.own["products"] and id(r) not in turns and r is not solver]
    unit = blocks.rows * blocks.keys / 1024
    of = lambda measure: (
        sum(measure(r) for r in plain) / unit + sum(measure(sweep.turn) for sweep in others) / (2 * unit)
    )
    bundles = inner.turn.own["bundles"] / (2 * unit)
    once = step + inner.opening.own["bundles"] + inner.odd.own["bundles"] - bundles * unit
    beside = steps.own["bundles"] + sum(r.own["bundles"] for r in steps.inside)
    total = 0.0
    for n in range(length // blocks.rows):
        tiles = -(-(n + 1) * blocks.rows // blocks.keys)
        total += beside + tiles * sum(map(cost, plain)) + sum(sweep.cycles(tiles, cost) for sweep in others)
        total += ITERATIONS * (step + inner.cycles(tiles, cost))
    return {
        "bundles": round(bundles, 3),
        "matrix": round(matrix(inner.turn) / (2 * unit), 3),
        "once": round(once),
        "passes": round(of(lambda r: r.own["bundles"]), 3),
        "passes_matrix": round(of(matrix), 3),
        "spills": root.total()["SPILL"],
        "kernel_bundles": root.total()["bundles"],
        "causal_cycles": {str(length): round(total)},
    }


def measure(
    name: str, chip: str, folder: pathlib.Path, target: Any, blocks: Blocks | None = None
) -> dict[str, dict[str, Any]]:
    """Facts of both kernels of a case, by part. The dump goes to `folder` (`llo.arguments`), as libtpu was told."""
    case = CASES[name]
    x = jax.ShapeDtypeStruct((case.batch, case.length, case.heads, case.width), jnp.bfloat16)
    blocks = blocks or default_blocks(x, x, x, chip)
    llo.clear(folder)
    started = time.process_time()
    compile_case(case, target, chip, blocks)
    seconds = round(time.process_time() - started, 1)
    found = {}
    for part in PARTS:
        (root,) = llo.kernels(folder, f"{NAME}_{part}", chip)
        found[part] = facts(root, chip, blocks, case.length) | {
            "vmem": llo.vmem(folder, f"{NAME}_{part}"),
            "blocks": dataclasses.asdict(blocks),
            "compile_cpu_seconds": seconds,
        }
    return found
