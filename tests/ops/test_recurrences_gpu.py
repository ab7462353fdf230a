"""Our kernels as implementations of recurrences on a GPU: chosen by auto on Hopper, and what the program is."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import use_abstract_mesh

from attnlab.errors import UserError
from attnlab.ops import dispatch
from attnlab.ops.feature_maps import Taylor
from attnlab.ops.flow_attention import FLOW_ATTENTION, flow_attention
from attnlab.ops.flow_definition import FlowRule
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, RecurrenceSpec, linear_recurrence
from attnlab.ops.memory_frame import MemorySpec, NeuralMemorySpec, initial_state
from attnlab.ops.neural_memory import NEURAL_MEMORY, neural_memory
from tests import tiers
from tests.ops.devices import on
from tests.ops.test_attention_flash_gpu import H100, KIND
from tests.ops.test_flow_kernel import SPEC as FLOW
from tests.ops.test_recurrence_kernel import spec

B, T, H, D = 2, 200, 2, 64
DOCUMENTS = jnp.arange(T)[None].repeat(B, 0) // 90
SWEEPS = {"forward", "backward_queries", "backward_keys", "backward_values"}
LEARNS = MemorySpec(16, False, (1.0,))
MEMORY = NeuralMemorySpec(2, 4096, 8, (D, D), "bfloat16", True, LEARNS)
NORM = dataclasses.replace(LEARNS, residual_norm=True)
NO_MEMORY = {
    "64 hidden units: W and S of layers 64x256x64 take 256 KiB": {"widths": (64, 256, 64)},
    "a norm are 64 wide, not 128": {"widths": (128, 128), "memory": NORM},
    "norm_scale=True; allowed: False": {"memory": dataclasses.replace(NORM, norm_scale=True)},
}
DEEP = MemorySpec(16, True, (1.0, 1.0))
NO_DEEP_MEMORY = {
    "one layer or two, not 3": {"widths": (D,) * 4},
    "activation=gelu; allowed: gelu_tanh": {"memory": dataclasses.replace(DEEP, activation="gelu")},
}


@pytest.mark.parametrize(
    "op, spec, refused",
    [
        (LINEAR_RECURRENCE, spec(), {"head widths are at most 256": {"width": 264}}),
        (FLOW_ATTENTION, FLOW, {"at most 128, not 192": {"width": 192}, "causal=False is not": {"causal": False}}),
        (NEURAL_MEMORY, MEMORY, NO_MEMORY),
        (NEURAL_MEMORY, dataclasses.replace(MEMORY, memory=NORM), {}),
        (NEURAL_MEMORY, dataclasses.replace(MEMORY, memory=DEEP, widths=(D,) * 3), NO_DEEP_MEMORY),
    ],
    ids=["recurrence", "flow", "memory", "memory with a norm", "memory of two layers"],
)
def test_auto(op, spec, refused):
    """On Hopper the kernel; XLA's form takes short rows, float32, what is too wide, other GPUs, each for a reason."""
    with on(KIND, "gpu"):
        assert op.pick(spec) == "pallas"
        short = {RecurrenceSpec: {"positions": 64}, NeuralMemorySpec: {"positions": 31}}
        short = short.get(type(spec), {"sinks": 64, "sources": 64})
        assert op.pick(dataclasses.replace(spec, **short)) == "chunked"
        for reason, changes in (refused | {"bfloat16, not float32": {"dtype": "float32"}}).items():
            changed = dataclasses.replace(spec, **changes)
            assert op.pick(changed) == "chunked"
            with pytest.raises(UserError, match=reason):
                op.pick(changed, "pallas")
    with on("NVIDIA A100-SXM4-80GB", "gpu"), pytest.raises(UserError, match="for Hopper, not NVIDIA A100"):
        op.pick(spec, "pallas")


def program(f, *shapes, lower=True):
    """What f and its gradient are traced or lowered to for an H100, and the FLOPs of chosen kernels, by name."""

    def run(*arrays):
        out, vjp = jax.vjp(f, *arrays)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    with on(KIND, "gpu"), dispatch.recording() as chosen, use_abstract_mesh(H100):
        traced = jax.jit(run).trace(*shapes)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True) if lower else str(traced.jaxpr)
    flops = {name: x for choice in chosen.choices for name, x in choice.kernel_flops.items()}
    return lowered, flops


def test_the_recurrence_is_the_program():
    """Documents, a state in and out, a decay, at a length that fills no chunk: its four sweeps, and no other form."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    x, state, decay = of(B, T, H, D), of(B, H, D, D, dtype=jnp.float32), of(B, T, H, dtype=jnp.float32)
    run = lambda q, k, u, a, s: linear_recurrence(q, k, u, log_decay=a, documents_BT=DOCUMENTS, state_BHde=s)
    text, flops = program(run, x, x, x, decay, state)
    assert set(re.findall(r"\blinear_recurrence_((?:forward|backward)\w*)", text)) == SWEEPS
    assert "mosaic_gpu" in text
    each = 2 * B * T * H * (64 * 2 * D + 2 * D * D)
    assert flops == {f"linear_recurrence_{name}": each for name in SWEEPS}


def test_queries_and_keys_of_all_heads_are_copied():
    """The kernel takes those of each head."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    run = lambda q, k, u, a: linear_recurrence(q, k, u, log_decay=a)
    x, decay = of(B, T, 1, D), of(B, T, H, dtype=jnp.float32)
    text, flops = program(run, x, x, of(B, T, H, D), decay, lower=False)
    assert SWEEPS == set(re.findall(r"\blinear_recurrence_((?:forward|backward)\w*)", text))
    assert flops["linear_recurrence_forward"] == 2 * B * T * H * (64 * 2 * D + 2 * D * D)


@tiers.exhaustive
def test_the_memory_is_the_program():
    """Documents, a state in and out, at a length that fills no group: its kernels, and no other form."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    x, gate = of(B, T, H, D), of(B, T, H, dtype=jnp.float32)

    def run(q, k, v, keep, eta, theta, weights):
        start = initial_state((weights,), 1, True)
        state = dataclasses.replace(initial_state((weights,), B, True), position_B=jnp.arange(B) + 7)
        y, end = neural_memory(q, k, v, keep, eta, theta, start, LEARNS, documents_BT=DOCUMENTS, state=state)
        return y, end.weights

    text, flops = program(run, x, x, x, gate, gate, gate, of(H, D, D, dtype=jnp.float32))
    names = {f"neural_memory_{name}" for name in ("forward", "again", "backward", "backward_groups")}
    assert set(re.findall(r"\bneural_memory_(?:forward|again|backward\w*)", text)) == names and "mosaic_gpu" in text
    assert flops.keys() == names
    assert flops["neural_memory_forward"] == 2 * B * T * H * (64 * (4 * 64 + 4 * D) + 6 * D * D)
    wide = dataclasses.replace(MEMORY, widths=(128, 128))
    with on(KIND, "gpu"):
        assert NEURAL_MEMORY.pick(wide) == "chunked" and NEURAL_MEMORY.pick(wide, "pallas") == "pallas"


def test_features_are_made_before():
    """Of queries and keys of width 16 they are 153, which is what the kernel takes; 273 are too many for it."""
    x, u = (jax.ShapeDtypeStruct((B, T, H, w), jnp.bfloat16) for w in (16, 65))
    text, flops = program(lambda q, k, u: linear_recurrence(q, k, u, features=Taylor(16)), x, x, u, lower=False)
    assert SWEEPS == set(re.findall(r"\blinear_recurrence_((?:forward|backward)\w*)", text))
    assert flops["linear_recurrence_forward"] == 2 * B * T * H * (64 * (153 + 65) + 2 * 153 * 65)
    with on(KIND, "gpu"):
        assert LINEAR_RECURRENCE.pick(spec(width=16, features=Taylor(16, symmetric=False))) == "chunked"


def test_flow_is_the_program():
    """Its kernels; of the gradient the output's sweeps are the recurrence's kernel."""
    x = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)
    run = lambda q, k, v: flow_attention(q, k, v, FlowRule(), causal=True, documents=DOCUMENTS).o
    text, flops = program(run, x, x, x, lower=False)
    backward = SWEEPS - {"forward"}
    assert "flow_forward" in text and "flow_backward" in text
    assert set(re.findall(r"\blinear_recurrence_((?:forward|backward)\w*)", text)) == backward
    assert flops["flow_forward"] == 2 * B * T * H * (64 * 3 * D + 2 * D * D)
    assert flops["flow_backward"] == 2 * B * T * H * 4 * 64 * D
    assert flops.keys() == {"flow_forward", "flow_backward"} | {f"linear_recurrence_{name}" for name in backward}
