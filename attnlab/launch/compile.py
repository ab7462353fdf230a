"""Compiles a run's train step for chips that are not here, and says what it will take: `attnlab compile`.

The TPU compiler itself comes with the package libtpu; it needs no TPU to compile for one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import mixers, ops
from attnlab.errors import UserError
from attnlab.launch import hlo
from attnlab.mixers.softmax import Softmax
from attnlab.models.cost import model_cost
from attnlab.train import optimizers, sharding
from attnlab.train.config import RunConfig
from attnlab.train.hardware import CHIPS, Chip
from attnlab.train.state import Model, init_state, state_shardings
from attnlab.train.step import make_train_step

_EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, tpu7x:4x4x4"
# Matrix products of each kernel of splash attention, against the two of a forward pass.
_KERNEL_WORK = {"_fwd": 1.0, "_dq": 1.5, "_dkv": 2.0}
# What the compiler says of a program that needs more memory than a chip has: what it needs, and what there is.
_REFUSED = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)


def prepare() -> None:
    """Lets libtpu be loaded with no TPU; call it before jax looks for devices."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # What libtpu would ask a TPU host for, and warns about; the topology's name says what is compiled for.
    host = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    for name, value in (host | {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
      name: as in `v5p:4x4x4`.
      devices: jax's descriptions of them.
      chip: its published figures, those of one jax device: a share where a chip is several.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip

    @classmethod
    def of(cls, name: str) -> Target:
        """The target of a topology's name.

        Raises:
          UserError: the name is no topology, or the compiler is not installed.
        """
        kind, _, shape = name.partition(":")
        if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
            raise UserError(f"topology {name!r} is unknown; allowed: TPUs by chip and shape, e.g. {_EXAMPLES}")
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("the TPU compiler is missing; it is a package: pip install libtpu (or attnlab[compile])")
        from jax.experimental import topologies

        sizes = [int(n) for n in shape.split("x")]
        # A host has four chips; what is smaller than that is one host.
        small = {"chips_per_host_bounds": tuple(sizes + [1] * (3 - len(sizes)))} if math.prod(sizes) < 4 else {}
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **small).devices
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0].partition(": ")[2]
            raise UserError(f"topology {name!r} is not possible: {reason}; e.g. {_EXAMPLES}") from None
        share = math.prod(sizes) / len(devices)
        figures = {field: value * share for field, value in dataclasses.asdict(CHIPS[kind]).items()}
        return cls(name, tuple(devices), Chip(**figures))


def compile_step(config: RunConfig, target: Target) -> dict[str, Any]:
    """Compiles the train step of a run on `target`, as `attnlab.train.loop` would, and measures the program.

    Returns:
      A report as `attnlab compile --json` prints it; sizes in bytes, times in seconds, all for one device and one step.
      Where the compiler refuses the program for want of memory, `memory.fits` is false, and what only a program has is
      missing.

    Raises:
      UserError: the config does not fit the target.
    """
    mesh = sharding.make_mesh(config.mesh, config.data.batch // config.train.accumulate, target.devices)
    model = Model.of(config.model)
    cost = model_cost(config.model, config.data.length)
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
    ops.clear_choices()
    started = time.perf_counter()
    lowered = _lower(config, model, mesh)
    report["trace_seconds"] = time.perf_counter() - started
    report["implementations"] = ops.choices()
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        report["compile_seconds"] = time.perf_counter() - started
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report | {"memory": _refused(str(error), target.chip)}
    report["compile_seconds"] = time.perf_counter() - started
    report["memory"] = _memory(compiled, target.chip)
    costs = hlo.analyse(compiled.as_text())
    counted_once = compiled.cost_analysis() or {}
    flops = {
        "declared": 3 * cost.total_flops * tokens,
        "compiler": costs.flops,
        "kernels": _kernel_flops(config, costs.kernels, cost.flops, tokens),
        "compiler_loops_once": counted_once.get("flops"),
    }
    kinds = {k: {"count": n, "bytes": costs.payload[k], "sent": costs.sent[k]} for k, n in sorted(costs.count.items())}
    sent = sum(costs.sent.values())
    floors = {
        "compute": (flops["compiler"] + flops["kernels"]) / target.chip.peak,
        "memory": costs.bytes / target.chip.bandwidth,
        "interconnect": sent / target.chip.interconnect,
    }
    slowest = max(floors, key=lambda name: floors[name])
    return report | {
        "flops": flops,
        "kernels": dict(costs.kernels),
        "collectives": kinds,
        "hbm_bytes": costs.bytes,
        "ici_bytes": sent,
        "floor_seconds": floors,
        "bound": slowest,
        "mfu_at_most": flops["declared"] / target.chip.peak / floors[slowest],
        "tokens_per_second_at_most": tokens * mesh.size / floors[slowest],
        "unknown_loops": len(costs.unknown_loops),
    }


def _lower(config: RunConfig, model: Model, mesh: Any) -> Any:
    rate = optimizers.schedule(config.optimizer, config.train.steps)
    tx = optimizers.build(config.optimizer, config.train.steps, model.axes)
    shardings = state_shardings(mesh, model, tx)
    shapes = jax.eval_shape(lambda: init_state(model, tx, config.seed))
    state = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    rows = jax.ShapeDtypeStruct(
        (config.data.batch, config.data.length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), rows)
    step = make_train_step(model, tx, config.train, rate, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch)


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


def _kernel_flops(config: RunConfig, kernels: dict[str, int], declared: dict[str, float], tokens: float) -> float:
    """FLOPs of attention inside kernels, which the compiler does not see: the declared ones, as often as kernels run.

    Every forward pass has one backward pass, which is one kernel for dq and one for dk and dv; forward passes that
    rematerialisation repeats are kernels, too.
    """
    started = lambda part: sum(n for name, n in kernels.items() if name.startswith("splash_mha" + part))
    runs = {part: started(part) for part in _KERNEL_WORK}
    if not runs["_dq"]:
        return 0.0
    names = {node.node_name for node in config.model.mixers.values()}
    of_kernels = {f"{name}.attention" for name in names if issubclass(mixers.get(name), Softmax)}
    forward = sum(value for part, value in declared.items() if part in of_kernels) * tokens
    return forward * sum(_KERNEL_WORK[part] * n for part, n in runs.items()) / runs["_dq"]
