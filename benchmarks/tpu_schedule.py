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
from collections.abc import Iterator, Sequence
from typing import Any

from attnlab.launch import (
    llo,
    schedules,
    schedules_agent,
    schedules_cross_entropy,
    schedules_delta_rule,
    schedules_flow,
    schedules_linear_recurrence,
    schedules_local_linear,
    schedules_neural_memory,
    schedules_rotary,
)
from attnlab.launch.schedules import TOPOLOGIES, Case, Reading, Shape

SHAPE = Shape()
LENGTHS = (4096, 16384)  # of the estimates
SPLASH_TILES = (512, 1024)
GROWTH, CHECKED = 0.05, ("full", "masked", "bundles", "passes", "spills", "kernel_bundles", "vmem")
FAMILIES = (
    schedules_linear_recurrence,
    schedules_delta_rule,
    schedules_flow,
    schedules_neural_memory,
    schedules_agent,
    schedules_local_linear,
    schedules_cross_entropy,
    schedules_rotary,
)
RECURRENCES = {f"{m.NAME}: {case}": (m, case) for m in FAMILIES for case in m.CASES}
Fact = tuple[str, str, dict[str, Any]]
CASES = {
    "causal": Case(),
    "intervals": Case(low=True),
    "causal, soft cap": Case(cap=50.0),
    "causal, sinks, gate": Case(sinks=True, gate=True),
    "parallax: causal": Case(probe=True),
    "causal, tile 256": Case(tile=(256, 256)),
    "causal, tile 512": Case(tile=(512, 512)),
    "pattern: coordinate, tile 256": Case(tile=(256, 256), axes=1),
    "pattern: coordinate, tile 512": Case(tile=(512, 512), axes=1),
    "pattern: groups, tile 256": Case(tile=(256, 256), groups=True),
    "pattern: groups, tile 512": Case(tile=(512, 512), groups=True),
}


def compile_splash(tile: int, target: Any) -> None:
    """jax's kernel, causal, with square tiles."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import SingleDeviceSharding

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((SHAPE.length, SHAPE.length))] * SHAPE.heads)
    kernel = splash.make_splash_mha(
        mask, block_sizes=splash.BlockSizes(**dict.fromkeys(names, tile)), head_shards=1, q_seq_shards=1
    )
    placed = SingleDeviceSharding(target.devices[0])
    arrays = [
        jax.ShapeDtypeStruct((SHAPE.batch, h, SHAPE.length, SHAPE.width), jnp.bfloat16, sharding=placed)
        for h in (SHAPE.heads, SHAPE.key_heads, SHAPE.key_heads)
    ]
    loss = lambda q, k, v: jnp.sum(jax.vmap(kernel)(q, k, v).astype(jnp.float32))
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()


def splash_facts(reading: Reading, tile: int) -> dict[str, Any]:
    """Of a splash kernel; its grid's own bundles are counted for active tiles alone, in its favour."""
    facts, total = reading.facts(), {}
    facts["beside"] = reading.grid().own["bundles"]
    for length in LENGTHS:
        n = length // tile
        each = max(facts["full"], facts["floor"]) * reading.unit + facts["beside"]
        total[str(length)] = round(n * (n + 1) / 2 * each)
    return facts | {"causal_cycles": total}


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


def measure(
    chips: list[str], cases: list[str], tiles: Sequence[int], recurrences: Sequence[str], folder: pathlib.Path
) -> Iterator[Fact]:
    """(chip, kernel, facts) of flash attention's cases, of splash attention with square tiles, and of recurrences.

    libtpu must not have been loaded before.
    """
    os.environ["LIBTPU_INIT_ARGS"] = llo.arguments(folder)
    from attnlab.launch import targets

    targets.prepare()
    for chip in chips:
        target = targets.Target.of(TOPOLOGIES[chip])
        for name in cases:
            case = CASES[name]
            for part, facts in schedules.flash(case, SHAPE, chip, folder, target, LENGTHS).items():
                yield chip, f"{case.kernel} {part}, {name.removeprefix('parallax: ')}", facts
        for tile in tiles:
            for part, facts in splash(tile, chip, folder, target).items():
                yield chip, f"splash {part}, causal, tile {tile}", facts
        for module, case in (RECURRENCES[name] for name in recurrences):
            for part, facts in module.measure(case, chip, folder, target).items():
                yield chip, f"{module.NAME} {part}, {case}", facts


TITLES = (f"{'':6}{'kernel':44}{'full':>7}{'masked':>8}{'floor':>7}{'matrix':>8}{'spills':>8}{'VMEM MiB':>10}",
          *(f"{f'{n // 1024}K Mcycles':>14}" for n in LENGTHS))  # fmt: skip


def row(chip: str, name: str, f: dict[str, Any]) -> str:
    """A line of the table; of a recurrence, bundles and matrix cycles per position and head."""
    if "bundles" in f:
        return (
            f"{chip:6}{name:44}{f['bundles']:>7.2f}{'':8}{f['matrix']:>7.2f}{f['matrix'] / f['bundles']:>8.0%}"
            f"{f['spills']:>8}{f['vmem'] / 2**20:>10.1f}"
        )
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
        for chip, name, facts in measure(args.chips, args.cases, args.tiles, args.recurrences, pathlib.Path(folder)):
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
        {name: x[name] for name in CHECKED if name in x}
        | {f"causal cycles {n}": c for n, c in x.get("causal_cycles", {}).items()}
    )
    now, then = flat(facts), flat(before)
    return [f"{name} {then[name]} -> {now[name]}" for name in then if now[name] > (1 + GROWTH) * then[name]]


def write(chip: str, name: str, found: dict[str, Any]) -> None:
    """Keeps a kernel's figures in the chip's table, beside others that are of the same versions."""
    path = recorded(chip)
    facts = {"versions": versions(), "shape": list(dataclasses.astuple(SHAPE)[:5]), "kernels": {}}
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
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="of attention")
    parser.add_argument("--tiles", nargs="*", type=int, default=SPLASH_TILES, help="of splash attention")
    parser.add_argument("--recurrences", nargs="*", choices=list(RECURRENCES), default=list(RECURRENCES))
    parser.add_argument("--check", action="store_true", help=f"fail where a figure is {GROWTH:.0%}% above the kept one")
    parser.add_argument("--write", action="store_true", help="keep the figures in kernels_pallas/tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
