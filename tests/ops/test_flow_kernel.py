"""Flow attention's kernels as an implementation of the op: when they are chosen, and what runs where."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attnlab.errors import UserError
from attnlab.ops.dispatch import interpreted
from attnlab.ops.flow_attention import FLOW_ATTENTION, FlowSpec, flow_attention
from attnlab.ops.flow_definition import FlowRule
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.mixers import precision
from tests.ops.devices import on

SPEC = FlowSpec(4, 4096, 4096, 16, 128, 128, "bfloat16", True, True, 64, FlowRule(), False)


REFUSED = {
    "causal=False is not": {"causal": False},
    "form=averages is not": {"rule": FlowRule(averages=True)},
    "a clip of at most 50, not None": {"rule": FlowRule(clip=None)},
    "split over devices": {"split": True},
    "bfloat16 and float32, not float64": {"dtype": "float64"},
}


def test_when_it_is_chosen():
    """On TPU by auto, but for the few positions of a stream's step and for what it cannot do, which it says by name."""
    assert FLOW_ATTENTION.pick(SPEC) == "chunked"
    with on("TPU v6e"):
        assert FLOW_ATTENTION.pick(SPEC) == "pallas"
        assert FLOW_ATTENTION.pick(dataclasses.replace(SPEC, rule=FlowRule(competition=False, clip=None))) == "pallas"
        assert FLOW_ATTENTION.pick(dataclasses.replace(SPEC, sinks=64, sources=64)) == "chunked"
        for reason, change in REFUSED.items():
            spec = dataclasses.replace(SPEC, **change)
            assert FLOW_ATTENTION.pick(spec) == "chunked"
            with pytest.raises(UserError, match=reason):
                FLOW_ATTENTION.pick(spec, "pallas")


def loss(q, k, v):
    out = flow_attention(q, k, v, FlowRule(), causal=True, impl="pallas")
    return jnp.sum(out.o) + jnp.sum(out.outgoing)


def test_under_checkpoint_nothing_is_saved_before_the_backward():
    """The first forward gives the output, the outgoing flows and the state; the second what the backward reads too."""
    x = jnp.ones((1, 128, 1, 8))
    with interpreted():
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: jax.checkpoint(loss)(x, x, x)))(x).jaxpr
    calls = [eqn for eqn in precision.equations(jaxpr) if eqn.primitive.name == "pallas_call"]
    found = [(eqn.params["name"], len(eqn.outvars)) for eqn in calls]
    assert found == [("flow_forward", 5), ("flow_forward", 8), ("flow_backward", 3)]


def test_split_over_batch_and_heads():
    """Each device runs the kernels on its own rows and heads; sizes are as of the whole."""
    x = jnp.ones((2, 128, 2, 8))
    devices = sharding.make_mesh(MeshConfig(data=2, tensor=2), 2)
    with interpreted():
        run = partition.traced(jax.value_and_grad(loss, (0, 1, 2)), devices, sharding.ACTIVATION_RULES)
        jaxpr, found = jax.make_jaxpr(run, return_shape=True)(x, x, x)
    assert [y.shape for y in found[1]] == [x.shape] * 3
    calls = [eqn for eqn in precision.equations(jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]
    assert {eqn.params["grid_mapping"].grid for eqn in calls} == {(1, 1, 1)} and len(calls) == 2
