"""Finds the tiles of our TPU kernels: timed where there is a TPU, else ranked by what its compiler schedules.

Each kernel's table (`kernels_pallas.tuning`) is written anew with every figure that comes, candidates and all, and the
next call goes on with what it holds.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import paths
from attnlab.errors import TrainingFailed, UserError
from attnlab.launch import llo, schedules
from attnlab.launch.schedules import Shape
from attnlab.launch.targets import Target
from kernels_pallas import tuning
from kernels_pallas.flash_attention import flash_attention

Say = Callable[[str], None]
# What is tried of each kernel, beside what its table holds.
_TRIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "flash_forward": {
        "rows": (256, 512, 1024), "keys": (512, 1024, 2048), "sub_rows": (128, 256, 512), "sub_keys": (256, 512, 1024),
        "ones": (True, False),
    },
    "flash_backward": {
        "rows": (512, 1024, 2048), "keys": (256, 512, 1024), "sub_rows": (256, 512), "sub_keys": (256, 512),
    },
}  # fmt: skip
KERNELS = tuple(_TRIED)
_SECONDS = 0.05  # that a timing lasts at least
_CLOSE = 0.05  # how far a candidate's results may be from the first's, of the largest


@dataclasses.dataclass(frozen=True)
class Job:
    """What to tune, and where what is found goes.

    Attributes:
      kernels: of `KERNELS`.
      shape: of causal self-attention.
      out: folder of the tables.
      count: candidates of a kernel.
      rounds: timings of each.
      seconds: after so many no candidate, or round, is begun.
    """

    kernels: tuple[str, ...]
    shape: Shape
    out: pathlib.Path
    count: int = 12
    rounds: int = 7
    seconds: float = 3600.0


def job(
    kernels: list[str], out: pathlib.Path, target: str | None, *, batch: int | None, heads: int | None,
    key_heads: int | None, count: int, rounds: int, seconds: float, **shape: Any,
) -> Job:  # fmt: skip
    """A job of what the command line says; UserError for what cannot be."""
    if unknown := [name for name in kernels if name not in KERNELS]:
        raise UserError(f"kernel {unknown[0]!r} has no tiles to tune; allowed: {', '.join(KERNELS)}")
    if target is not None and target not in schedules.TOPOLOGIES:
        raise UserError(f"--target {target!r} is no chip with tables; allowed: {', '.join(schedules.TOPOLOGIES)}")
    heads = heads or (2 if target else 8)
    of = Shape(batch or (64 if target else 4), heads=heads, key_heads=key_heads or heads, **shape)
    if of.heads % of.key_heads:
        raise UserError(f"--kv-heads {of.key_heads} is not possible; allowed: divisors of --heads {of.heads}")
    if of.length % 512:
        raise UserError(f"--length {of.length} is not possible; allowed: multiples of 512")
    return Job(tuple(dict.fromkeys(kernels)) or KERNELS, of, out, count, rounds, seconds)


def run(job: Job, target: str | None, say: Say) -> dict[str, Table]:
    """What was found of each kernel: timed on the TPU that is here, or as a target's compiler schedules it."""
    if target is None:
        return timed(job, say, kind=device())
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = llo.arguments(pathlib.Path(dump))  # libtpu reads it as it is loaded
        return scheduled(job, target, pathlib.Path(dump), say)


def candidates(kernel: str, kind: str, length: int, count: int) -> list[Any]:
    """Tiles to try for so many positions: those in use first, then the nearest to them, which differ in one field."""
    now = getattr(tuning, f"{kernel.removeprefix('flash_')}_blocks")(kind, length, length)
    fields = _TRIED[kernel]
    found = []
    for values in itertools.product(*fields.values()):
        blocks = type(now)(**dict(zip(fields, values)))
        if all(length % n == 0 for n in (blocks.rows, blocks.keys)) and _possible(blocks):
            found.append(blocks)
    differs = lambda blocks: sum(getattr(blocks, name) != getattr(now, name) for name in fields)
    rest = sorted((blocks for blocks in found if blocks != now), key=differs)
    return [now, *rest][:count]


def _possible(blocks: Any) -> bool:
    try:
        tuning.check(blocks)
    except ValueError:
        return False
    return True


class Table:
    """A kernel's table as a file, and what is known of each candidate."""

    def __init__(self, job: Job, kernel: str, kind: str, measure: str):
        self.path = job.out / kind / f"{kernel}.json"
        versions = {name: _version(name) for name in ("jax", "libtpu")}
        self.about = {"versions": versions, "measure": measure, "shape": dataclasses.asdict(job.shape)}
        self.figures: dict[Any, list[float]] = {}
        self.failed: dict[Any, str] = {}
        cls = type(candidates(kernel, kind, job.shape.length, 1)[0])
        known = self._known()
        for entry in known.get("candidates", []):
            blocks = cls(**entry["blocks"])
            if "failed" in entry:
                self.failed[blocks] = entry["failed"]
            else:
                self.figures[blocks] = entry["figures"]

    def _known(self) -> dict[str, Any]:
        """What a call before has left: of the same versions and shape, by the same measure."""
        if not self.path.exists():
            return {}
        try:
            known = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read: {error}; move it away, or give another --out") from None
        differs = [name for name in self.about if known.get(name) != self.about[name]]
        if differs:
            raise UserError(
                f"{self.path} holds tiles found with {differs[0]} {json.dumps(known.get(differs[0]))}, "
                f"now {json.dumps(self.about[differs[0]])}; give another --out"
            )
        return known

    def figure(self, blocks: Any) -> float:
        """The median."""
        return statistics.median(self.figures[blocks])

    def ranking(self) -> list[Any]:
        """Candidates that have figures, the best first."""
        return sorted(self.figures, key=self.figure)

    def report(self) -> dict[str, Any]:
        """What the file holds: what was measured, the best as "default", and all candidates, the best first."""
        entries = [{"blocks": dataclasses.asdict(b), "figures": self.figures[b]} for b in self.ranking()]
        entries += [{"blocks": dataclasses.asdict(b), "failed": reason} for b, reason in self.failed.items()]
        best = {"default": entries[0]["blocks"]} if self.figures else {}
        return self.about | best | {"candidates": entries}

    def write(self) -> None:
        """Writes it whole or not at all."""
        with paths.file_beside(str(self.path), lambda: None) as name:
            pathlib.Path(name).write_text(json.dumps(self.report(), indent=1) + "\n")


def scheduled(job: Job, chip: str, dump: pathlib.Path, say: Say) -> dict[str, Table]:
    """Tables of candidates by the cycles that a causal head takes, as `chip`'s compiler schedules it.

    Args:
      dump: where libtpu writes schedules (`llo.arguments`, before it is loaded).
    """
    target = Target.of(schedules.TOPOLOGIES[chip])
    tables, end = {}, time.monotonic() + job.seconds
    for kernel in job.kernels:
        part, table = kernel.removeprefix("flash_"), Table(job, kernel, chip, "cycles of a causal head")
        tables[kernel] = table
        tried = candidates(kernel, chip, job.shape.length, job.count)
        for n, blocks in enumerate(tried):
            if blocks in table.figures or blocks in table.failed:
                continue
            if time.monotonic() > end:
                break
            started = time.monotonic()
            try:
                given = tuning.Blocks(**{part: blocks})
                lengths = (job.shape.length,)
                facts = schedules.flash(schedules.Case(), job.shape, chip, dump, target, lengths, given, (part,))
            except (jax.errors.JaxRuntimeError, ValueError, StopIteration) as error:
                table.failed[blocks] = _reason(error)
            else:
                table.figures[blocks] = [float(facts[part]["causal_cycles"][str(job.shape.length)])]
            table.write()
            say(f"{_progress(table, kernel, n, len(tried), blocks)} ({time.monotonic() - started:.0f} s)")
    return _complete(tables)


def timed(job: Job, say: Say, *, kind: str, interpret: bool = False) -> dict[str, Table]:
    """Tables of candidates by the seconds that a call takes on this process's device, one after the other in rounds.

    A candidate's results must be those of the first. That of the backward is a call of both directions.
    """
    tables, end = {}, time.monotonic() + job.seconds
    for kernel in job.kernels:
        table = Table(job, kernel, kind, "seconds of a call")
        tables[kernel] = table
        tried = [b for b in candidates(kernel, kind, job.shape.length, job.count) if b not in table.failed]
        calls: dict[Any, Callable[[], Any]] = {}
        wanted = None
        for n, (blocks, call, failed) in enumerate(_compiled(kernel, job.shape, kind, tried, interpret)):
            if failed is None:
                results = jax.tree.leaves(call())
                wanted = results if wanted is None else wanted
                failed = _differ(results, wanted)
            if failed is None:
                calls[blocks] = call
                say(f"{kernel} {n + 1}/{len(tried)} {_words(blocks)}: compiled")
            else:
                table.failed[blocks] = failed
                say(_progress(table, kernel, n, len(tried), blocks))
                table.write()
            if time.monotonic() > end:
                break
        repeats = {blocks: max(1, round(_SECONDS / max(_time(call, 1), 1e-6))) for blocks, call in calls.items()}
        for n in range(job.rounds):
            if time.monotonic() > end and n:
                break
            for blocks, call in calls.items():
                if len(table.figures.get(blocks, ())) <= n:
                    table.figures.setdefault(blocks, []).append(_time(call, repeats[blocks]))
            table.write()
            if table.figures:
                best = table.ranking()[0]
                say(f"{kernel} round {n + 1}/{job.rounds}: best {_words(best)}, {table.figure(best) * 1e3:.3f} ms")
    return _complete(tables)


def _compiled(
    kernel: str, shape: Shape, kind: str, tried: list[Any], interpret: bool
) -> Iterator[tuple[Any, Callable[[], Any], str | None]]:
    """For each candidate what runs it, or why it has no program."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(shape.batch, shape.length, heads, shape.width) for heads in (shape.heads, *[shape.key_heads] * 2)]
    arrays = [jax.random.normal(key, size, jnp.float32).astype(shape.dtype) for key, size in zip(keys, sizes)]
    ends = jnp.arange(1, shape.length + 1, dtype=jnp.int32)[None]
    part = kernel.removeprefix("flash_")
    for blocks in tried:
        given = tuning.Blocks(**{part: blocks})

        def forward(q, k, v, given=given):
            with tuning.device_kind(kind):
                return flash_attention(q, k, v, ends=ends, platform="tpu", blocks=given, interpret=interpret)[0]

        def both(q, k, v, forward=forward):
            o, vjp = jax.vjp(forward, q, k, v)
            return vjp(o)

        try:
            program = jax.jit(forward if part == "forward" else both).lower(*arrays).compile()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            yield blocks, lambda: None, _reason(error)
            continue
        yield blocks, lambda program=program: program(*arrays), None


def _time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, of so many in a row."""
    started = time.perf_counter()
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / repeats


def _differ(results: list[jax.Array], wanted: list[jax.Array]) -> str | None:
    """Why results are not those wanted, or None."""
    for a, b in zip(results, wanted, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        if not bool(jnp.max(jnp.abs(a - b)) <= _CLOSE * jnp.max(jnp.abs(b))):
            return "its results are not those of the tiles in use"
    return None


def _complete(tables: dict[str, Table]) -> dict[str, Table]:
    for kernel, table in tables.items():
        if not table.figures:
            reasons = next(iter(table.failed.values()), "no time was left")
            raise TrainingFailed(f"{kernel}: no candidate has a figure: {reasons}")
    return tables


def _progress(table: Table, kernel: str, n: int, of: int, blocks: Any) -> str:
    head = f"{kernel} {n + 1}/{of} {_words(blocks)}"
    if blocks in table.failed:
        return f"{head}: {table.failed[blocks]}"
    return f"{head}: {table.figure(blocks):,.0f}, best {table.figure(table.ranking()[0]):,.0f}"


def _words(blocks: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(blocks).items())


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> str:
    """Kind of the TPU that this process has (`kernels_pallas.tuning.kind`); UserError where it has none."""
    platform, allowed = jax.default_backend(), ", ".join(schedules.TOPOLOGIES)
    if platform != "tpu":
        raise UserError(
            f"no TPU is here, the platform is {platform}; --target CHIP ({allowed}) ranks tiles with no device"
        )
    if not (kind := tuning.kind()):
        raise UserError(f"no tables are kept for {jax.devices()[0].device_kind!r}; allowed: {allowed}")
    return kind


def check_tables() -> None:
    """Raises UserError where the tables that the environment names cannot be used."""
    folder = os.environ.get(tuning.OWN_TABLES)
    if not folder:
        return
    try:
        for kind in schedules.TOPOLOGIES:
            tuning.forward_blocks(kind, 128, 128), tuning.backward_blocks(kind, 128, 128)
    except ValueError as error:
        raise UserError(str(error)) from None
