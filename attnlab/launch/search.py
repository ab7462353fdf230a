"""Which mesh, how many micro-batches and which rematerialisation: tried one after the other by compiling."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from attnlab.errors import UserError
from attnlab.launch.compile import compile_step
from attnlab.launch.targets import Target
from attnlab.models.cost import model_cost
from attnlab.train import sharding
from attnlab.train.config import MeshConfig, RunConfig
from attnlab.train.state import Model

# From the least memory to the most.
_REMAT = ("full", "attention", "minimal", "none")
_PARAMETER_BYTES = 4  # moments come on top, by the optimizer
_MOST_WITHIN = 16  # tensor and context exchange activations in every layer: beyond a few chips that is all that they do


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay a run out."""

    mesh: MeshConfig
    accumulate: int
    remat: str

    def apply(self, config: RunConfig) -> RunConfig:
        """The run's config, laid out so."""
        return dataclasses.replace(
            config,
            mesh=self.mesh,
            train=dataclasses.replace(config.train, accumulate=self.accumulate),
            model=dataclasses.replace(config.model, remat=self.remat),
        )

    def overrides(self) -> str:
        """What to put on the command line."""
        mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in self.mesh.sizes().items())
        return f"{mesh} --config.train.accumulate={self.accumulate} --config.model.remat={self.remat}"


def search(
    config: RunConfig, target: Target, *, seconds: float, count: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compiles candidates until the time or their number is up, or all are known.

    Within a mesh, one that needs more memory than another that does not fit is not tried. The batch is the config's:
    all candidates compute the same step.

    Args:
      config: of the run.
      target: where it will run.
      seconds: no compile starts later than this.
      count: compiles, at most.
      say: takes a line for each candidate.

    Returns:
      Reports of `compile_step` with `overrides`, those that fit first, the fastest by their slowest floor first.
    """
    started = time.perf_counter()
    reports: list[dict[str, Any]] = []
    for mesh in _meshes(config, target):
        refused: list[Candidate] = []
        rows = config.data.batch // (mesh.data * mesh.fsdp)
        for remat in _REMAT:
            # More micro-batches only where fewer do not fit: the weights are gathered for each.
            for accumulate in (n for n in range(1, rows + 1) if rows % n == 0):
                candidate = Candidate(mesh, accumulate, remat)
                if any(_smaller(other, candidate) for other in refused):
                    continue
                spent = time.perf_counter() - started
                if len(reports) >= count or spent > seconds:
                    say(f"stopped after {len(reports)} compiles, {spent:.0f} s")
                    return rank(reports)
                try:
                    report = compile_step(candidate.apply(config), target) | {"overrides": candidate.overrides()}
                except UserError as error:  # a mixer that cannot be split so
                    say(f"{_name(candidate)}: not possible: {error}")
                    refused.append(Candidate(mesh, rows, _REMAT[0]))
                    break
                reports.append(report)
                say(f"{_name(candidate)}: {_outcome(report)}")
                if report["memory"]["fits"]:
                    break
                refused.append(candidate)
    return rank(reports)


def rank(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that fit first; of these the fastest, by the slowest of their floors, then by all of them."""

    def key(report: dict[str, Any]) -> tuple[float, ...]:
        floors = report.get("floor_seconds", {"": float("inf")}).values()
        return (not report["memory"]["fits"], max(floors), sum(floors))

    return sorted(reports, key=key)


def _meshes(config: RunConfig, target: Target) -> list[MeshConfig]:
    """All splits that can hold the model: first those that ask for the least communication."""
    devices, shapes = len(target.devices), Model.of(config.model)
    parameters = model_cost(config.model, config.data.length).parameters * _PARAMETER_BYTES
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    within = [axis for axis in config.mesh.sizes() if axis not in sharding.BATCH_AXES]
    few = [n for n in sizes if n <= _MOST_WITHIN]
    meshes = []
    for fsdp, *inner in itertools.product(sizes, *(few for _ in within)):
        split = fsdp * math.prod(inner)
        if devices % split or parameters / split > target.chip.hbm:
            continue
        mesh = dataclasses.replace(
            config.mesh, data=devices // split, fsdp=fsdp, **dict(zip(within, inner, strict=True))
        )
        try:
            made = sharding.make_mesh(mesh, config.data.batch, target.devices, length=config.data.length)
            sharding.parameter_shardings(made, shapes.axes, shapes.pure_shapes)
        except UserError:
            continue
        meshes.append(mesh)
    return sorted(meshes, key=lambda m: (devices // (m.data * m.fsdp), m.tensor, m.data))


def _smaller(known: Candidate, candidate: Candidate) -> bool:
    """Whether one that is known not to fit needs no more memory than another."""
    saved = _REMAT.index(known.remat) <= _REMAT.index(candidate.remat)
    return saved and known.accumulate >= candidate.accumulate


def _name(candidate: Candidate) -> str:
    sizes = ", ".join(f"{axis} {size}" for axis, size in candidate.mesh.sizes().items() if size > 1)
    return f"{sizes or 'one device'}, accumulate {candidate.accumulate}, remat {candidate.remat}"


def _outcome(report: dict[str, Any]) -> str:
    memory, seconds = report["memory"], f"compiled in {report['compile_seconds']:.0f} s"
    if not memory["fits"]:
        return f"does not fit; {seconds}"
    floor = report["floor_seconds"][report["bound"]]
    return f"{(memory['peak'] or memory['total']) / 2**30:.1f} GiB, {floor:.3g} s by {report['bound']}; {seconds}"
