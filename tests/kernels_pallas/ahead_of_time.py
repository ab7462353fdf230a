"""Compiles the Hopper kernels for an H100 that is not here, by the ptxas of jax's CUDA plugin, and reads what it says.

    python -m tests.kernels_pallas.ahead_of_time [case ...]     one JSON line for each kernel of each case

A program of its own: ptxas writes to the process's file descriptors, and speaks only if asked before jax starts.
"""

from __future__ import annotations

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}

import contextlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any, ClassVar  # noqa: E402

import jax  # noqa: E402
import jax.experimental.mosaic.gpu.core as mosaic  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh  # noqa: E402

from attnlab.launch.targets import Target  # noqa: E402
from kernels_pallas import hopper  # noqa: E402
from kernels_pallas.agent_attention import gpu_agent_attention  # noqa: E402
from kernels_pallas.cross_entropy import cross_entropy  # noqa: E402
from kernels_pallas.delta_rule import delta_rule  # noqa: E402
from kernels_pallas.flash_attention import Pattern, Term, flash_attention, gpu_pattern  # noqa: E402
from kernels_pallas.flow_attention import Rule  # noqa: E402
from kernels_pallas.flow_attention import gpu_backward as flow_backward  # noqa: E402
from kernels_pallas.flow_attention import gpu_forward as flow_forward  # noqa: E402
from kernels_pallas.linear_recurrence import linear_recurrence  # noqa: E402
from kernels_pallas.local_linear_attention import local_linear_attention  # noqa: E402
from kernels_pallas.neural_memory import neural_memory  # noqa: E402
from kernels_pallas.parallax_attention import parallax_attention  # noqa: E402
from kernels_pallas.routed_attention import routed_attention, row_tile  # noqa: E402

H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)
B, T, H, K = 2, 4096, 8, 2
# Features by letter: intervals, sinks, cap, gate, bias of keys, deterministic, rows packed (always with intervals). Of
# the delta rule: packed documents, a state before the first position, the forward without a gradient.
CASES = {
    "64 i": (64, 64, "i"),
    "64 iscgb": (64, 64, "iscgb"),
    "128": (128, 128, ""),
    "128 i": (128, 128, "i"),
    "128 iscgb": (128, 128, "iscgb"),
    "128 isgbd": (128, 128, "isgbd"),
    "192/128 i": (192, 128, "i"),
    "256 i": (256, 256, "i"),
    "256 iscgb": (256, 256, "iscgb"),
    "64 r": (64, 64, "r"),
    "128 r": (128, 128, "r"),
    "128 rcd": (128, 128, "rcd"),
    "256 r": (256, 256, "r"),
    "delta 64": (64, 64, ""),
    "delta 64 f": (64, 64, "f"),
    "delta 128": (128, 128, ""),
    "delta 128 ps": (128, 128, "ps"),
}
# Masks beyond intervals, by terms: each its coordinates, and g where it has groups. Other features as above.
MASKED = {f"masked {d} {terms} {features}".strip(): (d, terms.split("|"), features) for d, terms, features in (
    (64, "1", ""), (64, "g", ""), (64, "2g|1g", "scgb"), (64, "4g|4g", "sgb"), (128, "1", ""), (128, "g", ""),
    (128, "2g|1g", "scgb"), (128, "4g|4g", "sgbd"), (256, "1", ""), (256, "2g|1g", "scgb"))}  # fmt: skip
# Of recurrences: a decay for each position, one that is constant, packed documents, a state in.
RECURRENCES = {
    f"recurrence {d}/{e} {features}": (d, e, features)
    for d, e, features in ((64, 64, "aps"), (64, 128, "cs"), (128, 64, "ap"), (128, 128, "aps"), (128, 128, ""),
                           (128, 129, "aps"), (256, 256, "aps"))
}  # fmt: skip
FLOWS = {f"flow {d}/{e} {features}": (d, e, features) for d, e, features in (
    (64, 64, "ps"), (64, 128, ""), (128, 64, "ps"), (128, 128, ""), (128, 128, "ps"))}  # fmt: skip
# Of agent attention: 64 agents, or 16, packed documents, a state in.
AGENTS = {f"agent {d}/{e} {features}": (d, e, features) for d, e, features in (
    (64, 64, "ps"), (128, 64, "k"), (64, 128, "k"), (128, 128, ""), (128, 128, "kps"))}  # fmt: skip

# Of a memory: widths of its layers, chunk, and whether it has the norm.
MEMORIES = {f"memory {d} chunk {chunk}": ((d, d), chunk, False) for d in (64, 128) for chunk in (16, 64)}
MEMORIES |= {f"memory 64 chunk {chunk} norm": ((64, 64), chunk, True) for chunk in (16, 64)}
MEMORIES |= {f"memory 64/64 chunk {chunk}{' norm' * normed}": ((64,) * 3, chunk, normed)
             for chunk in (16, 64) for normed in (False, True)}  # fmt: skip

LOCAL = {f"local {d} {features}".strip(): (d, features) for d in (64, 128) for features in ("", "i")}
PARALLAX = {f"parallax {d} {features}".strip(): (d, features) for d in (64, 128) for features in ("", "i")}
LOSSES = {"loss 1000/20000": (1000, 20000)}  # widths of hidden states, and columns, neither of whole tiles


class _Limit(int):
    """Mosaic's limit of shared memory, which notes what each kernel asks for."""

    asked: ClassVar[list[int]] = []

    def __lt__(self, other: int) -> bool:
        if other == int(self):  # Mosaic takes the smaller of its own limit, which is the same, and this: this one
            return True
        self.asked.append(int(other))
        return int(self) < other


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """What anything writes to standard output and error meanwhile."""
    text: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        sys.stdout.flush()
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def masked_program(d: int, terms: list[str], features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, under a mask of each query head's own; deterministic where its features say `d`."""
    (rows, keys), n = gpu_pattern.TILE, T
    of = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((B, H, *shape), dtype, sharding=placed)

    def term(said: str) -> Term:
        axes, grouped = int(said.rstrip("g") or 0), said.endswith("g")
        bits = (of(n // keys, n), of(n)) if grouped else (None, None)
        return Term(of(2 + 2 * axes, n), of(axes, n) if axes else None, *bits)

    pattern = Pattern(of(n // rows, n // keys, dtype=jnp.int8), tuple(map(term, terms)), n // keys, gpu_pattern.TILE)
    return program(d, d, features, placed, pattern=pattern)


def program(d: int, e: int, features: str, placed: Any, **masked: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Attention and its gradient, and the arrays that it takes."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {"q": of(B, T, H, d), "k": of(B, T, K, d), "v": of(B, T, K, e)}
    more = {"s": ("sinks", of(H, dtype=jnp.float32)), "g": ("gate", of(B, T, H, e)),
            "b": ("key_bias", of(B, K, T, dtype=jnp.float32))}  # fmt: skip
    arrays |= dict(more[f] for f in features if f in more)
    bounds = masked or {name: of(1, T, dtype=jnp.int32) for name in ("starts", "ends") if "i" in features}

    def run(arrays: dict[str, Any], bounds: dict[str, Any], do: Any, dlse: Any) -> Any:
        cap = 30.0 if "c" in features else None
        attend = lambda a: flash_attention(**a, **bounds, soft_cap=cap, platform="cuda", deterministic="d" in features)
        out, vjp = jax.vjp(attend, arrays)
        return out, vjp((do, dlse))

    return run, [arrays, bounds, of(B, T, H, e), of(B, T, H, dtype=jnp.float32)]


def packed_program(d: int, e: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, for as many rows packed into tiles."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows, tile = T * H, row_tile("", T * H, K, max(d, e), platform="cuda")
    arrays, do = (of(B, rows, d), of(B, T, K, d), of(B, T, K, e)), (of(B, rows, e), of(B, rows, dtype=jnp.float32))
    tables = [of(B, n, dtype=jnp.int32) for n in (rows, rows, rows // tile)]
    cap = 30.0 if "c" in features else None

    def run(arrays: Any, tables: Any, do: Any) -> Any:
        attend = lambda *a: routed_attention(*a, *tables, soft_cap=cap, platform="cuda", deterministic="d" in features)
        out, vjp = jax.vjp(attend, *arrays)
        return out, vjp(do)

    return run, [arrays, tables, do]


def delta_program(d: int, e: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of the gated delta rule."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    arrays = {name: of(B, T, H, w, dtype=jnp.bfloat16) for name, w in (("q", d), ("k", d), ("v", e))}
    arrays |= {name: of(B, T, H) for name in ("log_decay", "beta")}
    arrays |= {"state": of(B, H, d, e)} if "s" in features else {}
    starts = of(B, T, dtype=jnp.int32) if "p" in features else None

    def run(arrays: Any, starts: Any, cotangents: Any) -> Any:
        rule = lambda a: delta_rule(**a, starts=starts, platform="cuda")
        if "f" in features:
            return rule(arrays)
        out, vjp = jax.vjp(rule, arrays)
        return out, vjp(cotangents)

    return run, [arrays, starts, (of(B, T, H, e, dtype=jnp.bfloat16), of(B, H, d, e))]


def recurrence_program(d: int, e: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, for the linear recurrence."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    wide = lambda *shape: of(*shape, dtype=jnp.float32)
    arrays = {"q": of(B, T, H, d), "k": of(B, T, H, d), "u": of(B, T, H, e)}
    more = {"a": ("log_decay", wide(B, T, H)), "c": ("log_decay", wide(H)), "s": ("state", wide(B, H, d, e))}
    arrays |= dict(more[f] for f in features if f in more)
    starts = of(B, T, dtype=jnp.int32) if "p" in features else None

    def run(arrays: Any, starts: Any, cotangents: Any) -> Any:
        out, vjp = jax.vjp(lambda a: linear_recurrence(**a, starts=starts, platform="cuda"), arrays)
        return out, vjp(cotangents)

    return run, [arrays, starts, (of(B, T, H, e), wide(B, H, d, e))]


def flow_program(d: int, e: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of flow attention's own kernels: its gradient's sweeps are the recurrence's."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    N, keys = T // flow_forward.CHUNK, of(B, T, H, d, dtype=jnp.bfloat16)
    limits = of(B, T, dtype=jnp.int32) if "p" in features else None
    vectors, pairs = of(B, H, 4, d), of(B, H, d, e) if "s" in features else None
    own = hopper.DEVICE, Rule()

    def run(arrays: Any, limits: Any, sums: Any, saved: Any) -> Any:
        found = flow_forward.forward(*own, *arrays[:4], limits, *sums, width=d, save=True)
        q, k, *_, numbers, dq, dk = arrays
        return found, flow_backward.backward(*own, q, k, dq, dk, numbers, limits, saved, *sums[:2])

    arrays = keys, keys, of(B, T, H, e, dtype=jnp.bfloat16), of(B, T), of(B, H, 8, T), keys, keys
    return run, [arrays, limits, (vectors, of(B, H), pairs), of(B, H, N, 4, d)]


def memory_program(
    widths: tuple[int, ...], chunk: int, normed: bool, placed: Any
) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of the neural memory, documents and a state."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    rows, gate = of(B, T, H, widths[0], dtype=jnp.bfloat16), of(B, T, H)
    layers = lambda n: tuple(of(n, H, *pair) for pair in zip(widths, widths[1:]))

    def run(arrays: Any, positions: Any, initial: Any, carried: Any, cotangents: Any) -> Any:
        learn = lambda arrays, initial, carried: neural_memory(
            *arrays, weights=initial, momentum=initial, chunk=chunk, residual_norm=normed, rates=(1.0,) * len(initial),
            positions=positions, carried=carried, platform="cuda",
        )  # fmt: skip
        out, vjp = jax.vjp(learn, arrays, initial, carried)
        return out, vjp(cotangents)

    states = layers(B)
    cotangents = rows, states, states, states
    return run, [(rows,) * 3 + (gate,) * 3, of(B, T, dtype=jnp.int32), layers(1), (states, states), cotangents]


def agent_program(d: int, e: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of agent attention."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    wide, m = lambda *shape: of(*shape, dtype=jnp.float32), 16 if "k" in features else 64
    arrays = {"q": of(B, T, H, d), "k": of(B, T, H, d), "v": of(B, T, H, e), "agents": of(H, m, d)}
    arrays |= {"state": (wide(B, H, m), wide(B, H, m, e))} if "s" in features else {}
    starts = of(B, T, dtype=jnp.int32) if "p" in features else None

    def run(arrays: Any, starts: Any, cotangents: Any) -> Any:
        out, vjp, exact = jax.vjp(lambda a: _split(gpu_agent_attention(**a, starts=starts)), arrays, has_aux=True)
        return out, exact, vjp(cotangents)

    return run, [arrays, starts, (of(B, T, H, e), (wide(B, H, m), wide(B, H, m, e)))]


def _split(found: tuple[Any, Any, Any]) -> tuple[tuple[Any, Any], Any]:
    """o and the state, and whether o is exact."""
    o, state, exact = found
    return (o, state), exact


def loss_program(width: int, columns: int, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of cross-entropy."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def run(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, cotangents: Any) -> Any:
        out, vjp = jax.vjp(lambda *a: cross_entropy(*a, targets, platform="cuda"), hidden, kernel)
        return out, vjp(cotangents)

    return run, [of(T, width, dtype=jnp.bfloat16), of(width, columns), of(T, dtype=jnp.int32), (of(T), of(T))]


def local_program(d: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of local linear attention."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    bounds = {name: of(1, T, dtype=jnp.int32) for name in ("starts", "ends") if "i" in features}

    def run(arrays: Any, bounds: Any, do: Any) -> Any:
        out, vjp = jax.vjp(lambda *a: local_linear_attention(*a, **bounds, platform="cuda").o, *arrays)
        return out, vjp(do)

    arrays = of(B, T, H, d), of(B, T, H, dtype=jnp.float32), of(B, T, K, d), of(B, T, K, d)
    return run, [arrays, bounds, of(B, T, H, d)]


def parallax_program(d: int, features: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """As `program`, of Parallax."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    bounds = {name: of(1, T, dtype=jnp.int32) for name in ("starts", "ends") if "i" in features}

    def run(arrays: Any, bounds: Any, do: Any) -> Any:
        out, vjp = jax.vjp(lambda *a: parallax_attention(*a, **bounds, platform="cuda"), *arrays)
        return out, vjp(do)

    rows, keys = of(B, T, H, d), of(B, T, K, d)
    return run, [(rows, rows, keys, keys), bounds, rows]


def program_of(case: str, placed: Any) -> tuple[Callable[..., Any], list[Any]]:
    """What a case compiles, and for what arrays."""
    if case in MASKED:
        return masked_program(*MASKED[case], placed)
    if case in RECURRENCES:
        return recurrence_program(*RECURRENCES[case], placed)
    if case in MEMORIES:
        return memory_program(*MEMORIES[case], placed)
    if case in LOSSES:
        return loss_program(*LOSSES[case], placed)
    if case in LOCAL:
        return local_program(*LOCAL[case], placed)
    if case in PARALLAX:
        return parallax_program(*PARALLAX[case], placed)
    if case in FLOWS:
        return flow_program(*FLOWS[case], placed)
    if case in AGENTS:
        return agent_program(*AGENTS[case], placed)
    if case.startswith("delta"):
        return delta_program(*CASES[case], placed)
    return (packed_program if "r" in case else program)(*CASES[case], placed)


def kernels(case: str, placed: Any) -> Iterator[dict[str, Any]]:
    """For each kernel of a case: its name, bytes of spills and registers; and of all of the case's the most bytes of
    shared memory, and the C75 warnings, each of which says that the tensor cores were serialized."""
    run, arrays = program_of(case, placed)
    _Limit.asked.clear()
    with captured() as text, use_abstract_mesh(H100):
        jax.jit(run).lower(*arrays).compile()
    parts = re.split(r"Compiling entry function '(\w+)_mosaic_gpu_kernel'", text[0])
    assert len(parts) // 2 == len(_Limit.asked) > 0, text[0][-2000:]
    warnings = sorted(set(re.findall(r"C75\d\d", text[0])))
    for name, said in zip(parts[1::2], parts[2::2]):
        spills = re.search(r"(\d+) bytes spill stores", said)
        registers = re.search(r"Used (\d+) registers", said)
        yield {
            "case": case, "kernel": name, "spills": int(spills[1]), "registers": int(registers[1]),
            "shared_memory": max(_Limit.asked), "serialized": warnings,
        }  # fmt: skip


def main() -> None:
    mosaic._SMEM_SIZE_BOUND = _Limit(hopper.SMEM_BYTES)
    placed = SingleDeviceSharding(Target.of("h100:1").devices[0])
    for case in sys.argv[1:] or CASES | MASKED | RECURRENCES | FLOWS | AGENTS | MEMORIES | LOSSES | LOCAL | PARALLAX:
        for found in kernels(case, placed):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
