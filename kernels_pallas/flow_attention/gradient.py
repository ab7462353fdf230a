"""The gradient around the two sweeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kernels_pallas import tuning
from kernels_pallas.flow_attention import layout, tpu_backward, tpu_forward
from kernels_pallas.flow_attention.layout import Blocks, Sums
from kernels_pallas.flow_attention.plan import Rule


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static, as given to `flow_attention`; `kind` of devices (`kernels_pallas.tuning.kind`)."""

    rule: Rule
    kind: str
    interpret: Any
    blocks: Blocks


def flow(call: Call, q, k, v, documents, count, before: Sums | None):
    """o, the outgoing flows [B, T, H] (None without competition) and the sums after the last position.

    `count` [B]: positions before the first; None: none, and then `before` is None.
    """
    simulated = not isinstance(call.interpret, bool)
    return (_simulated if simulated else _optimised)(call, q, k, v, documents, count, before)


def _flow(call: Call, *arrays):
    return _forward(call, *arrays, False)[0]


def _forward(call: Call, q, k, v, documents, count, before, save: bool):
    plan = layout.plan_of(call.rule, call.blocks, q, v, documents is not None, before is not None, save)
    found = tpu_forward.run(
        plan, *(layout.wide(plan, x) for x in (q, k, v)), *layout.places(plan, documents, count),
        None if before is None else layout.state_tiles(plan, before),
        vmem=tuning.vmem_limit(call.kind), interpret=call.interpret,
    )  # fmt: skip
    outgoing = layout.by_position(plan, found["outgoing"]) if call.rule.competition else None
    ends = (found[name] for name in ("S_after", "sums_after", "rivals_after"))
    after = layout.from_tiles(plan, *ends, layout.VECTORS, v.shape[3])
    kept = {name: found[name] for name in ("numbers", "outgoing", "vectors", "states") if name in found}
    return (layout.narrow(plan, found["o"], v), outgoing, after), kept


def _flow_forward(call: Call, *arrays):
    out, kept = _forward(call, *arrays, True)
    return out, (arrays, kept)


def _flow_backward(call: Call, residuals, cotangents):
    (q, k, v, documents, count, before), kept = residuals
    do, d_outgoing, d_after = cotangents
    plan = layout.plan_of(call.rule, call.blocks, q, v, documents is not None, before is not None, True)
    found = tpu_backward.run(
        plan, *(layout.wide(plan, x) for x in (q, k, v, do.astype(v.dtype))), *layout.places(plan, documents, count),
        kept, None if d_outgoing is None else layout.by_head(plan, d_outgoing),
        layout.tiles(plan, d_after, layout.GRADIENTS),
        vmem=tuning.vmem_limit(call.kind), interpret=call.interpret,
    )  # fmt: skip
    d_before = None
    if before is not None:
        starts = (found[name] for name in ("dS_before", "d_sums_before", "d_rivals_before"))
        d_before = layout.from_tiles(plan, *starts, layout.GRADIENTS, v.shape[3])
    grads = (layout.narrow(plan, found[f"d{name}"], x) for name, x in (("q", q), ("k", k), ("v", v)))
    return (*grads, None, None, d_before)


# Under `jax.checkpoint` the forward that keeps nothing runs where nothing is differentiated yet. jax can tell
# only where there are no side effects; the simulation of a TPU has some.
_optimised = jax.custom_vjp(_flow, nondiff_argnums=(0,))
_optimised.defvjp(_flow_forward, _flow_backward, optimize_remat=True)
_simulated = jax.custom_vjp(_flow, nondiff_argnums=(0,))
_simulated.defvjp(_flow_forward, _flow_backward)
