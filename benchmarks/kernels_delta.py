"""What jax computes of the gated delta rule in `benchmarks.kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels_cases import DeltaCase
from kernels_pallas import hopper

_WRONG = 0.02  # of the largest value: what bfloat16 errs, several times over
_DIFFERENTIATED = ("q", "k", "v", "log_decay", "beta")


def rule(peer: str, case: DeltaCase) -> Callable[[dict[str, Any]], jax.Array] | str:
    """The outputs as a function of the arrays, or why a peer does not give them."""
    if peer == "ours":
        return _ours(False, case)
    if peer == "xla":
        return functools.partial(_op, case, "chunked")
    return f"{peer} has no delta rule"


def check_same_rule(case: DeltaCase, o: Any) -> None:
    """Raises ValueError where a peer's output is not that of the definition, bfloat16 apart."""
    inputs = {name: jnp.asarray(x) for name, x in case.arrays().items() if name != "do"}
    off = np.abs(np.asarray(o, np.float32) - np.asarray(_op(case, "definition", inputs))).max()
    if not off < 0.05:
        raise ValueError(f"it computes another rule: off by {off}")


def parity(dry: bool, case: DeltaCase, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """Errors of ours, values and gradients, against the definition in float32, of the largest value; and whether two
    runs are the same bits."""
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    exact, run = _both(functools.partial(_op, case, "definition"))(wide), _both(_ours(dry, case))
    ours, again = run(arrays), run(arrays)
    errors = {}
    for name, value in exact.items():
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (ours[name], value))
        errors[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    failed = [name for name, error in errors.items() if not error <= _WRONG]
    differing = [name for name in exact if not jnp.array_equal(ours[name], again[name])]
    return {"errors": errors, "failed": failed, "differ_between_runs": differing}


def _ours(dry: bool, case: DeltaCase) -> Callable[[dict[str, Any]], jax.Array]:
    """Our kernel; in a dry run interpreted, or, where jax cannot, the definition in its place."""
    from kernels_pallas.delta_rule import delta_rule

    if dry and hopper.missing_interpreter():
        return functools.partial(_op, case, "definition")
    starts = None if case.starts() is None else jnp.asarray(case.starts())
    return lambda arrays: delta_rule(**arrays, starts=starts, platform="cuda", interpret=dry)[0]


def _op(case: DeltaCase, impl: str, arrays: dict[str, Any]) -> jax.Array:
    from attnlab.ops.delta_rule import delta_rule

    starts = case.starts()
    documents = None if starts is None else jnp.asarray(starts // max(case.T // 8, 1) + 1)
    return delta_rule(*(arrays[name] for name in _DIFFERENTIATED), documents_BT=documents, impl=impl)[0]


def _both(run: Callable[[dict[str, Any]], jax.Array]) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """o and the gradients for do, compiled."""

    @jax.jit
    def both(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        o, vjp = jax.vjp(run, {name: arrays[name] for name in _DIFFERENTIATED})
        return {"o": o} | {f"d{name}": x for name, x in vjp(arrays["do"].astype(o.dtype))[0].items()}

    return both
