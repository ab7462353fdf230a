"""Compiles a run's train step for chips that are not here, and says what it will take: `attnlab compile`."""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from attnlab import ops
from attnlab.launch import hlo
from attnlab.launch.targets import Target
from attnlab.models.cost import model_cost
from attnlab.train.config import RunConfig
from attnlab.train.hardware import Chip
from attnlab.train.program import Program

# What the compiler says of a program that needs more memory than a chip has: what it needs, and what there is.
_REFUSED = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)


def compile_step(config: RunConfig, target: Target) -> dict[str, Any]:
    """Compiles the train step of a run on `target`, as `attnlab.train.loop` would, and measures the program.

    Returns:
      A report as `attnlab compile --json` prints it; sizes in bytes, times in seconds, all for one device and one step.
      Where the compiler refuses the program for want of memory, `memory.fits` is false, and what only a program has is
      missing.

    Raises:
      UserError: the config does not fit the target.
    """
    program = Program(config, target.devices)
    mesh = program.mesh
    cost = program.traced(model_cost)(config.model, config.data.length, config.data.batch // config.train.accumulate)
    tokens = config.data.batch * config.data.length / mesh.size
    report: dict[str, Any] = {
        "topology": target.name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "sequences": config.data.batch,
        "length": config.data.length,
        "accumulate": config.train.accumulate,
        "remat": config.model.remat,
        "parameters": cost.parameters,
    }
    started = time.perf_counter()
    with ops.recording() as chosen:
        lowered = program.train_step.lower(program.state, program.batch)
    report["trace_seconds"] = time.perf_counter() - started
    report["implementations"] = chosen.table()
    started, started_cpu = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refused = None, str(error)
    report["compile_seconds"] = time.perf_counter() - started
    report["compile_cpu_seconds"] = time.process_time() - started_cpu
    if compiled is None:
        return report | {"memory": _refused(refused, target.chip)}
    report["memory"] = _memory(compiled, target.chip)
    costs = hlo.analyse(compiled.as_text(), target.domains(list(mesh.devices.flat)))
    counted_once = compiled.cost_analysis() or {}
    flops = {
        "declared": 3 * cost.total_flops * tokens,
        "compiler": costs.flops,
        "kernels": chosen.kernel_flops(costs.kernels),
        "compiler_loops_once": counted_once.get("flops"),
    }
    kinds = {
        kind: {"count": n, "bytes": costs.payload[kind], "sent": costs.sent[kind], "crossing": costs.crossing[kind]}
        for kind, n in sorted(costs.count.items())
    }
    sent, crossing = sum(costs.sent.values()), sum(costs.crossing.values())
    floors = _floors(target.chip, flops["compiler"] + flops["kernels"], costs.bytes, sent, crossing)
    slowest = max(floors, key=lambda name: floors[name])
    return report | {
        "flops": flops,
        "kernels": dict(costs.kernels),
        "collectives": kinds,
        "hbm_bytes": costs.bytes,
        "interconnect_bytes": sent,
        "network_bytes": crossing,
        "floor_seconds": floors,
        "bound": slowest,
        "mfu_at_most": flops["declared"] / target.chip.peak / floors[slowest],
        "tokens_per_second_at_most": tokens * mesh.size / floors[slowest],
        "unknown_loops": len(costs.unknown_loops),
    }


def _floors(chip: Chip, flops: float, moved: float, sent: float, crossing: float) -> dict[str, float]:
    """Seconds that a step takes at least, by what each chip computes, moves and sends."""
    floors = {"compute": flops / chip.peak, "memory": moved / chip.bandwidth, "interconnect": sent / chip.interconnect}
    return floors | ({"network": crossing / chip.network} if crossing and chip.network else {})


def _memory(compiled: Any, chip: Chip) -> dict[str, Any]:
    """Bytes of a program's memory; outputs that take the place of a donated argument are counted once in `total`."""
    m = compiled.memory_analysis()
    parts = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "aliased": m.alias_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    peak = getattr(m, "peak_memory_in_bytes", 0) or None
    needed = peak or total
    verdict = {"hbm": chip.hbm, "fits": needed <= chip.hbm, "spare": chip.hbm - needed}
    return parts | {"total": total, "peak": peak} | verdict


def _refused(message: str, chip: Chip) -> dict[str, Any]:
    """What the compiler says of a program that it refuses."""
    found = next((found for pattern in _REFUSED if (found := pattern.search(message))), None)
    memory: dict[str, Any] = {"fits": False, "hbm": chip.hbm, "spare": None, "peak": None, "total": None}
    if found:
        unit = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
        needed, limit = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
        memory |= {"hbm": limit, "peak": needed, "spare": limit - needed}
    return memory
