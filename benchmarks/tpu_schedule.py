"""What libtpu schedules for attention's TPU kernels, read with no TPU: `python -m benchmarks.tpu_schedule`.

Compiles flash attention, forward and backward, for each TPU generation, and jax's splash attention in the same run.
b/Ks are bundles per 1024 scores, of a tile whose scores are all seen and of one that is masked; a bundle takes a cycle
where nothing stalls. A tile takes as long as its bundles, or as its products occupy the matrix units if that is more:
the floor. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import llo

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
BATCH, LENGTH, HEADS, KEY_HEADS, WIDTH = 64, 4096, 2, 1, 128  # more than fast memory holds
LENGTHS = (4096, 16384)  # of the estimates
SPLASH_TILES = (512, 1024)
GROWTH, CHECKED = 0.05, ("full", "masked", "spills", "kernel_bundles", "vmem")
Fact = tuple[str, str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Features of a call of flash attention."""

    low: bool = False
    sinks: bool = False
    gate: bool = False
    cap: float | None = None


CASES = {
    "causal": Case(),
    "intervals": Case(low=True),
    "causal, soft cap": Case(cap=50.0),
    "causal, sinks, gate": Case(sinks=True, gate=True),
}


def compile_flash(case: Case, target: Any, chip: str) -> None:
    """Forward and backward for a chip; what is scheduled is in the dump."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from kernels_pallas import tuning
    from kernels_pallas.flash_attention import flash_attention

    placed = SingleDeviceSharding(target.devices[0])
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {
        "q": of(BATCH, LENGTH, HEADS, WIDTH),
        "k": of(BATCH, LENGTH, KEY_HEADS, WIDTH),
        "v": of(BATCH, LENGTH, KEY_HEADS, WIDTH),
    }
    if case.sinks:
        arrays["sinks"] = of(HEADS, dtype=jnp.float32)
    if case.gate:
        arrays["gate"] = of(BATCH, LENGTH, HEADS, WIDTH)
    bounds = {name: of(1, LENGTH, dtype=jnp.int32) for name in ("starts",) * case.low + ("ends",)}

    def loss(arrays, bounds):
        with tuning.device_kind(chip):
            o, _ = flash_attention(**arrays, **bounds, soft_cap=case.cap, platform="tpu")
        return jnp.sum(o.astype(jnp.float32))

    jax.jit(jax.grad(loss)).lower(arrays, bounds).compile()


def compile_splash(tile: int, target: Any) -> None:
    """jax's kernel, causal, with square tiles."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import SingleDeviceSharding

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)
    kernel = splash.make_splash_mha(
        mask, block_sizes=splash.BlockSizes(**dict.fromkeys(names, tile)), head_shards=1, q_seq_shards=1
    )
    placed = SingleDeviceSharding(target.devices[0])
    arrays = [
        jax.ShapeDtypeStruct((BATCH, h, LENGTH, WIDTH), jnp.bfloat16, sharding=placed)
        for h in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    loss = lambda q, k, v: jnp.sum(jax.vmap(kernel)(q, k, v).astype(jnp.float32))
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()


class Reading:
    """One kernel's schedule, in bundles per 1024 scores of its tile."""

    def __init__(self, root: llo.Region, chip: str, scores: int):
        self.root, self.chip, self.unit = root, chip, scores / 1024
        self.most = max(r.own["products"] for r in root.walk())
        self.floor = self.cycles(self.most) / self.unit

    def cycles(self, products: float) -> float:
        """That products occupy the matrix units."""
        return products * llo.CYCLES[self.chip] / llo.UNITS[self.chip]

    def bundles(self, chosen: Callable[[llo.Region], bool]) -> list[tuple[float, int]]:
        """(b/Ks, spills) of the regions that are chosen."""
        return [(r.own["bundles"] / self.unit, r.own["SPILL"]) for r in self.root.walk() if chosen(r)]

    def tiles(self) -> list[tuple[float, int]]:
        """Those with all of a tile's products, the shortest first."""
        return sorted(self.bundles(lambda r: r.own["products"] == self.most))

    def grid(self) -> llo.Region:
        """The loop over the grid."""
        return max((r for r in self.root.inside if r.kind == "loop"), key=lambda r: r.total()["bundles"])

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


def forward_facts(reading: Reading, blocks: Any) -> dict[str, Any]:
    """Of flash attention's forward: the tile, what comes before and after a row tile's steps, and estimates."""
    loop = next(r.start for r in reading.root.walk() if r.kind == "loop" and r is not reading.grid())
    ends = lambda r: 0 < r.own["products"] < reading.most
    first = sorted(reading.bundles(lambda r: ends(r) and r.start < loop))
    last = reading.bundles(lambda r: ends(r) and r.start > loop)[0]
    beside = reading.beside()
    facts = reading.facts() | {
        "first": round(first[0][0], 3),
        "first_masked": round(first[-1][0], 3),
        "last": round(last[0], 3),
        "beside": beside,
    }
    times = {"first": first[0][0], "first_masked": first[-1][0], "last": last[0]}
    cost = {name: x * reading.unit for name, x in times.items()}
    for name in ("full", "masked"):
        cost[name] = max(facts[name], facts["floor"]) * reading.unit
    total = {}
    for length in LENGTHS:
        cycles = 0.0
        for walk in causal_walks(length, blocks):
            cycles += beside + cost["first_masked" if walk[0] else "first"] + cost["last"]
            cycles += sum(cost["masked" if masked else "full"] for masked in walk[1:])
        total[str(length)] = round(cycles)
    return facts | {"causal_cycles": total}


def backward_facts(reading: Reading, blocks: Any) -> dict[str, Any]:
    """Of flash attention's backward; gradients of keys are set to 0 once for a key head's query heads."""
    beside = reading.beside()
    zeroes = max(r.own["bundles"] for r in reading.root.walk() if not r.inside and not r.own["products"])
    facts = reading.facts() | {"beside": beside, "zeroes": zeroes}
    cost = {name: max(facts[name], facts["floor"]) * reading.unit for name in ("full", "masked")}
    total = {}
    for length in LENGTHS:
        walks = causal_walks(length, blocks)
        cycles = zeroes * length / LENGTH * KEY_HEADS / HEADS
        cycles += sum(beside + sum(cost["masked" if masked else "full"] for masked in walk) for walk in walks)
        total[str(length)] = round(cycles)
    return facts | {"causal_cycles": total}


def splash_facts(reading: Reading, tile: int) -> dict[str, Any]:
    """Of a splash kernel; its grid's own bundles are counted for active tiles alone, in its favour."""
    facts, total = reading.facts(), {}
    facts["beside"] = reading.grid().own["bundles"]
    for length in LENGTHS:
        n = length // tile
        each = max(facts["full"], facts["floor"]) * reading.unit + facts["beside"]
        total[str(length)] = round(n * (n + 1) / 2 * each)
    return facts | {"causal_cycles": total}


def causal_walks(length: int, blocks: Any) -> list[list[bool]]:
    """For each row tile the key tiles that it meets, the last first: whether each is masked."""
    walks = []
    for n in range(length // blocks.rows):
        first_row, last_row = n * blocks.rows, (n + 1) * blocks.rows
        tiles = range(-(-last_row // blocks.keys) - 1, -1, -1)
        walks.append([(j + 1) * blocks.keys > first_row + 1 for j in tiles])
    return walks


def flash(case: Case, chip: str, folder: pathlib.Path, target: Any) -> dict[str, dict[str, Any]]:
    """Facts of both kernels of a case."""
    from kernels_pallas import tuning

    llo.clear(folder)
    started = time.process_time()
    compile_flash(case, target, chip)
    seconds = round(time.process_time() - started, 1)
    blocks = {
        "forward": tuning.forward_blocks(chip, LENGTH, LENGTH),
        "backward": tuning.backward_blocks(chip, LENGTH, LENGTH),
    }
    found = {}
    for part, describe in (("forward", forward_facts), ("backward", backward_facts)):
        (root,) = llo.kernels(folder, f"flash_{part}", chip)
        reading = Reading(root, chip, blocks[part].rows * blocks[part].keys)
        found[part] = describe(reading, blocks[part]) | {
            "vmem": llo.vmem(folder, f"flash_{part}"),
            "blocks": dataclasses.asdict(blocks[part]),
            "compile_cpu_seconds": seconds,
        }
    return found


def splash(tile: int, chip: str, folder: pathlib.Path, target: Any) -> dict[str, dict[str, Any]]:
    """Facts of splash attention's three kernels."""
    llo.clear(folder)
    compile_splash(tile, target)
    found = {}
    for part in ("fwd", "dq", "dkv"):
        (root,) = llo.kernels(folder, f"splash_mha_{part}", chip)
        found[part] = splash_facts(Reading(root, chip, tile * tile), tile) | {
            "vmem": llo.vmem(folder, f"splash_mha_{part}")
        }
    return found


def measure(chips: list[str], cases: list[str], tiles: Sequence[int], folder: pathlib.Path) -> Iterator[Fact]:
    """(chip, kernel, facts) of flash attention's cases, and of splash attention with square tiles.

    libtpu must not have been loaded before.
    """
    os.environ["LIBTPU_INIT_ARGS"] = llo.arguments(folder)
    from attnlab.launch import targets

    targets.prepare()
    for chip in chips:
        target = targets.Target.of(TOPOLOGIES[chip])
        for name in cases:
            for part, facts in flash(CASES[name], chip, folder, target).items():
                yield chip, f"flash {part}, {name}", facts
        for tile in tiles:
            for part, facts in splash(tile, chip, folder, target).items():
                yield chip, f"splash {part}, causal, tile {tile}", facts


TITLES = (f"{'':6}{'kernel':44}{'full':>7}{'masked':>8}{'floor':>7}{'matrix':>8}{'spills':>8}{'VMEM MiB':>10}",
          *(f"{f'{n // 1024}K Mcycles':>14}" for n in LENGTHS))  # fmt: skip


def row(chip: str, name: str, f: dict[str, Any]) -> str:
    """A line of the table."""
    cycles = "".join(f"{f['causal_cycles'][str(n)] / 1e6:>14.3f}" for n in LENGTHS)
    return (
        f"{chip:6}{name:44}{f['full']:>7.2f}{f['masked']:>8.2f}{f['floor']:>7.2f}{f['matrix_share']:>8.0%}"
        f"{f['spills']:>8}{f['vmem'] / 2**20:>10.1f}{cycles}"
    )


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def main() -> int:
    """0, or 1 where `--check` finds that a schedule has grown."""
    args = _parser().parse_args()
    print("".join(TITLES), flush=True)
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for chip, name, facts in measure(args.chips, args.cases, args.tiles, pathlib.Path(folder)):
            print(row(chip, name, facts), flush=True)
            if args.check:
                complaints += [f"{chip} {name}: {what}" for what in grown(facts, known(chip, name))]
            if args.write:
                write(chip, name, facts)
    for complaint in complaints:
        print(complaint)
    return int(bool(complaints))


def known(chip: str, name: str) -> dict[str, Any] | None:
    """A kernel's recorded figures; None where there are none of these versions of jax and libtpu."""
    path = recorded(chip)
    table = json.loads(path.read_text()) if path.exists() else {"versions": None}
    return table["kernels"].get(name) if table["versions"] == versions() else None


def grown(facts: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What is more than `GROWTH` above what it was."""
    if before is None:
        return ["nothing is recorded for these versions of jax and libtpu"]
    flat = lambda x: (
        {name: x[name] for name in CHECKED} | {f"causal cycles {n}": c for n, c in x["causal_cycles"].items()}
    )
    now, then = flat(facts), flat(before)
    return [f"{name} {then[name]} -> {now[name]}" for name in then if now[name] > (1 + GROWTH) * then[name]]


def write(chip: str, name: str, found: dict[str, Any]) -> None:
    """Keeps a kernel's figures in the chip's table, beside others that are of the same versions."""
    path = recorded(chip)
    facts = {"versions": versions(), "shape": [BATCH, LENGTH, HEADS, KEY_HEADS, WIDTH], "kernels": {}}
    if path.exists() and (known := json.loads(path.read_text()))["versions"] == facts["versions"]:
        facts["kernels"] = known["kernels"]
    facts["kernels"][name] = found
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in facts.pop("kernels").items())
    head = ",\n".join(f" {json.dumps(name)}: {json.dumps(x)}" for name, x in facts.items())
    path.write_text(f'{{\n{head},\n "kernels": {{\n{rows}\n }}\n}}\n')


def recorded(chip: str) -> pathlib.Path:
    """Where a chip's figures are kept: `attnlab.ops` chooses by them."""
    from kernels_pallas import tuning

    return tuning.TABLES / chip / "schedule.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=list(TOPOLOGIES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tiles", nargs="*", type=int, default=SPLASH_TILES, help="of splash attention")
    parser.add_argument("--check", action="store_true", help=f"fail where a figure is {GROWTH:.0%} above the kept one")
    parser.add_argument("--write", action="store_true", help="keep the figures in kernels_pallas/tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
