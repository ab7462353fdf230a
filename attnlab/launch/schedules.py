"""What libtpu schedules for flash attention on TPUs that are not here, and what follows for a causal head.

b/Ks are bundles per 1024 scores; a bundle takes a cycle where nothing stalls. A tile takes as long as its bundles, or
as its products occupy the matrix units if that is more: the floor.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnlab.launch import llo
from kernels_pallas import tuning
from kernels_pallas.flash_attention import Pattern, Term, flash_attention
from kernels_pallas.parallax_attention import parallax_attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of self-attention: B, T, H, K, d; what of it is not in fast memory must be more than that holds."""

    batch: int = 64
    length: int = 4096
    heads: int = 2
    key_heads: int = 1
    width: int = 128
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Case:
    """Features of a call of flash attention; with a probe it is Parallax, which has of the others `low` alone.

    `tile`, rows and keys, is by default that of `tuning`. With coordinates or groups the mask is a pattern.
    """

    low: bool = False
    sinks: bool = False
    gate: bool = False
    cap: float | None = None
    probe: bool = False
    tile: tuple[int, int] | None = None
    axes: int = 0
    groups: bool = False

    @property
    def kernel(self) -> str:
        """With what its kernels' names begin."""
        return "parallax" if self.probe else "masked" if self.pattern else "flash"

    @property
    def pattern(self) -> bool:
        """Whether the mask is more than intervals."""
        return bool(self.axes) or self.groups

    def blocks(self, part: str, chip: str, length: int) -> Any:
        """Tiles by default, of the forward or the backward, over so many positions."""
        default = {"forward": tuning.forward_blocks, "backward": tuning.backward_blocks}[part]
        if self.tile is None:
            return default(chip, length, length, "parallax" if self.probe else "flash")
        return tuning.in_tiles(default(chip, length, length), *self.tile)


PARTS = ("forward", "backward")


def compile_flash(
    case: Case, shape: Shape, target: Any, chip: str, blocks: tuning.Blocks | None = None, backward: bool = True
) -> Any:
    """Forward, and backward if asked for, compiled for a chip; what is scheduled is in the dump."""
    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *sizes, dtype=shape.dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)
    array = lambda heads: of(shape.batch, shape.length, heads, shape.width)
    arrays = {"q": array(shape.heads), "k": array(shape.key_heads), "v": array(shape.key_heads)}
    if case.sinks:
        arrays["sinks"] = of(shape.heads, dtype=jnp.float32)
    if case.gate:
        arrays["gate"] = array(shape.heads)
    if case.probe:
        arrays["probe"] = array(shape.heads)
    bounds = {name: of(1, shape.length, dtype=jnp.int32) for name in ("starts",) * case.low + ("ends",)}
    if case.pattern:
        bounds = {"pattern": pattern_of(case, shape.length, of)}

    def loss(arrays, bounds):
        with tuning.device_kind(chip):
            if case.probe:
                o = parallax_attention(**arrays, **bounds, blocks=blocks)
            else:
                o, _ = flash_attention(**arrays, **bounds, soft_cap=case.cap, platform="tpu", blocks=blocks)
        return jnp.sum(o.astype(jnp.float32))

    return jax.jit(jax.grad(loss) if backward else loss).lower(arrays, bounds).compile()


def pattern_of(case: Case, length: int, of: Any) -> Pattern:
    """A pattern, one for all sequences and heads, of `of(*shape, dtype=)`."""
    (rows, keys), n = case.tile, length
    array = lambda *shape: of(1, 1, *shape, dtype=jnp.int32)
    term = Term(
        array(2 + 2 * case.axes, n),
        array(case.axes, n) if case.axes else None,
        array(n // keys, n) if case.groups else None,
        array(n) if case.groups else None,
    )
    return Pattern(of(1, 1, n // rows, n // keys, dtype=jnp.int8), (term,), n // keys, case.tile)


class Reading:
    """One kernel's schedule, in bundles per 1024 scores of its tile; tiles are `within` a region, or anywhere."""

    def __init__(self, root: llo.Region, chip: str, scores: int, within: llo.Region | None = None):
        self.root, self.chip, self.unit, self.within = root, chip, scores / 1024, within or root
        self.most = max(r.own["products"] for r in self.within.walk())
        self.floor = self.cycles(self.most) / self.unit

    def cycles(self, products: float) -> float:
        """That products occupy the matrix units."""
        return products * llo.CYCLES[self.chip] / llo.UNITS[self.chip]

    def cost(self, region: llo.Region) -> float:
        """Cycles of a region: its bundles, or what its products take if that is more."""
        return max(region.own["bundles"], self.cycles(region.own["products"]))

    def tiles(self) -> list[tuple[float, int]]:
        """(b/Ks, spills) of the regions with all of a tile's products, the shortest first."""
        tiles = [r for r in self.within.walk() if r.own["products"] == self.most]
        return sorted((r.own["bundles"] / self.unit, r.own["SPILL"]) for r in tiles)

    def grid(self) -> llo.Region:
        """The loop over the grid."""
        return grid(self.root)

    def beside(self) -> int:
        """Bundles of a step of the grid beside those that products are in, and what runs now and then."""
        return sum(r.own["bundles"] for r in self.root.walk() if r.inside and not r.own["products"] and r != self.root)

    def facts(self) -> dict[str, Any]:
        """The figures of a tile."""
        (full, spills), (masked, masked_spills) = self.tiles()[0], self.tiles()[-1]
        return {
            "full": round(full, 3),
            "masked": round(masked, 3),
            "floor": round(self.floor, 3),
            "matrix_share": round(self.floor / max(full, self.floor), 3),
            "spills": spills,
            "masked_spills": masked_spills,
            "kernel_bundles": self.root.total()["bundles"],
        }


def grid(root: llo.Region) -> llo.Region:
    """A kernel's loop over its grid."""
    return max((r for r in root.inside if r.kind == "loop"), key=lambda r: r.total()["bundles"])


def forward_facts(root: llo.Region, chip: str, blocks: Any, shape: Shape, lengths: Sequence[int]) -> dict[str, Any]:
    """Of flash attention's forward: the tile, what comes before and after a row tile's steps, and estimates."""
    steps = next(r for r in root.walk() if r.kind == "loop" and r is not grid(root))
    reading = Reading(root, chip, blocks.rows * blocks.keys, steps)
    outside = [r for r in root.walk() if r.own["products"] and not steps.start <= r.start < steps.end]
    opening, closing = ([r for r in outside if (r.start < steps.start) is before] for before in (True, False))
    asks = min(r.own["products"] for r in opening)
    first = sorted((r for r in opening if r.own["products"] == asks), key=reading.cost)
    halved = [r for r in opening if r.own["products"] > asks]
    facts = reading.facts() | {
        "first": round(first[0].own["bundles"] / reading.unit, 3),
        "first_masked": round(first[-1].own["bundles"] / reading.unit, 3),
        "last": round(closing[0].own["bundles"] / reading.unit, 3),
        "beside": reading.beside(),
    }
    if halved:
        facts["first_halved"] = halved[0].own["bundles"]
    step = [max(facts[name], facts["floor"]) * reading.unit for name in ("full", "masked")]
    total = {}
    for length in lengths:
        cycles = 0.0
        for n, walk in enumerate(causal_walks(length, blocks)):
            cycles += facts["beside"] + reading.cost(closing[0])
            if halved and last_is_halved(n, walk, blocks):
                cycles, walk = cycles + reading.cost(halved[0]), walk[1:]
            else:
                cycles += reading.cost(first[-1] if walk[0] else first[0])
            cycles += sum(step[masked] for masked in walk[1:])
        total[str(length)] = round(cycles)
    return facts | {"causal_cycles": total}


def backward_facts(root: llo.Region, chip: str, blocks: Any, shape: Shape, lengths: Sequence[int]) -> dict[str, Any]:
    """Of flash attention's backward; gradients of keys are set to 0, and turned, once for a key head's query heads."""
    reading = Reading(root, chip, blocks.rows * blocks.keys)
    leaves = [r for r in root.walk() if not r.inside and not r.own["products"]]
    once = {kind: max(r.own["bundles"] for r in leaves if r.kind == kind) for kind in ("when", "loop")}
    halved = [r for r in root.walk() if 0 < r.own["products"] < reading.most]
    facts = reading.facts() | {"beside": reading.beside(), "zeroes": once["when"], "turned": once["loop"]}
    if halved:
        facts["halved"] = halved[0].own["bundles"]
    cost = {name: max(facts[name], facts["floor"]) * reading.unit for name in ("full", "masked")}
    total = {}
    for length in lengths:
        of_keys = facts["zeroes"] * length / shape.length + facts["turned"] * length / blocks.keys
        cycles = of_keys * shape.key_heads / shape.heads
        for n, walk in enumerate(causal_walks(length, blocks)):
            cycles += facts["beside"]
            if halved and last_is_halved(n, walk, blocks):
                cycles, walk = cycles + reading.cost(halved[0]), walk[1:]
            cycles += sum(cost["masked" if masked else "full"] for masked in walk)
        total[str(length)] = round(cycles)
    return facts | {"causal_cycles": total}


def last_is_halved(n: int, walk: list[bool], blocks: Any) -> bool:
    """Whether the second half of row tile `n` alone sees the last of the key tiles that it meets."""
    return len(walk) > 1 and n * blocks.rows + blocks.rows // 2 <= (len(walk) - 1) * blocks.keys


def causal_walks(length: int, blocks: Any) -> list[list[bool]]:
    """For each row tile the key tiles that it meets, the last first: whether each is masked."""
    walks = []
    for n in range(length // blocks.rows):
        first_row, last_row = n * blocks.rows, (n + 1) * blocks.rows
        tiles = range(-(-last_row // blocks.keys) - 1, -1, -1)
        walks.append([(j + 1) * blocks.keys > first_row + 1 for j in tiles])
    return walks


def flash(
    case: Case,
    shape: Shape,
    chip: str,
    folder: pathlib.Path,
    target: Any,
    lengths: Sequence[int],
    blocks: tuning.Blocks | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, dict[str, Any]]:
    """Facts of the kernels of a case, by `parts`; estimates are of a causal head of these lengths.

    The dump goes to `folder` (`llo.arguments`, before libtpu is loaded). `blocks`: by default those of `tuning`.
    """
    llo.clear(folder)
    started = time.process_time()
    given = blocks or tuning.Blocks()
    of_parts = {part: getattr(given, part) or case.blocks(part, chip, shape.length) for part in PARTS}
    if not case.pattern:
        blocks = tuning.Blocks(**of_parts)
    compile_flash(case, shape, target, chip, blocks, "backward" in parts)
    seconds = round(time.process_time() - started, 1)
    found = {}
    describe = {"forward": forward_facts, "backward": backward_facts}
    for part in parts:
        (root,) = llo.kernels(folder, f"{case.kernel}_{part}", chip)
        found[part] = describe[part](root, chip, of_parts[part], shape, lengths) | {
            "vmem": llo.vmem(folder, f"{case.kernel}_{part}"),
            "blocks": dataclasses.asdict(of_parts[part]),
            "compile_cpu_seconds": seconds,
        }
    return found
