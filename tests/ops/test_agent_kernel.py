"""Our kernel as an implementation of causal agent attention: when it is chosen, what it gets, split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from attnlab import ops
from attnlab.errors import UserError
from attnlab.ops import agent_kernel
from attnlab.ops.agent import CAUSAL_AGENT_ATTENTION, AgentSpec, causal_agent_attention
from attnlab.ops.agent_causal import LOWEST, Averages, fixed_agent_attention
from attnlab.ops.dispatch import interpreted
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.ops.devices import on
from tests.ops.recurrences import DOCUMENTS, H100, assert_same


def spec(**changes):
    facts = dict(batch=2, positions=4096, heads=16, width=128, value_width=128, agents=16, dtype="bfloat16",
                 packed=True, features=("causal", "fixed"))  # fmt: skip
    return AgentSpec(**(facts | changes))


def test_auto():
    """On TPU the kernel, on any kind; XLA's form takes what is shorter than half a chunk, float64, averages too large
    for the chip, and agents that are made anew in packed rows, in streams and often."""
    op, huge = CAUSAL_AGENT_ATTENTION, {"agents": 65536, "width": 1024}
    anew = {"features": ("causal", "refreshed"), "chunk": 64}
    whole = anew | {"packed": False}
    stream = whole | {"features": ("causal", "refreshed", "stream")}
    for kind in ("TPU v5e", "TPU v6e", "TPU7x"):
        with on(kind):
            for changes in (
                {},
                {"dtype": "float32"},
                {"heads": 25, "width": 153},
                {"agents": 49, "positions": 1000},
                whole,
            ):
                assert op.pick(spec(**changes)) == "pallas", changes
            for changes in (
                {"positions": 63},
                {"positions": 1},
                {"dtype": "float64"},
                anew,
                stream,
                whole | {"chunk": 16},
                huge,
            ):
                assert op.pick(spec(**changes)) == "chunked", changes
            refused = (
                ({"dtype": "float64"}, "not float64"),
                (anew, "in packed documents may"),
                (stream, "in a stream may"),
                (huge, "65536 agents"),
            )
            for changes, says in refused:
                with pytest.raises(UserError, match=says):
                    op.pick(spec(**changes), "pallas")
    assert op.pick(spec()) == "chunked"


def test_auto_on_gpus():
    """On Hopper the kernel, with its FLOPs; XLA's form takes other GPUs, other types, wider heads, more agents, and
    what is shorter, each but the last with its reason."""
    op = CAUSAL_AGENT_ATTENTION
    with on("NVIDIA H100 80GB HBM3", "gpu"), ops.recording() as chosen:
        assert op.choose(spec()) and chosen.choices[0].implementation == "pallas"
        refused = (
            ({"dtype": "float32"}, "not float32"),
            ({"width": 136}, "at most 128, not 136 and 128"),
            ({"agents": 65}, "at most 64 agents, not 65"),
            ({"features": ("causal", "refreshed"), "chunk": 64}, "in packed documents may"),
        )
        for change, says in refused:
            assert op.pick(spec(**change)) == "chunked"
            with pytest.raises(UserError, match=says):
                op.pick(spec(**change), "pallas")
        assert op.pick(spec(positions=63)) == "chunked" and op.pick(spec(positions=64)) == "pallas"
    with on("NVIDIA A100-SXM4-80GB", "gpu"):
        assert op.pick(spec()) == "chunked"
        with pytest.raises(UserError, match="for Hopper, not NVIDIA A100"):
            op.pick(spec(), "pallas")
    # Two warpgroups make all weights: of keys, of queries, their sums and their pairs.
    each, d, m, C = 2.0 * 2 * 4096 * 16, 128, 64, 64
    found = chosen.kernel_flops({"agent_attention_forward": 1})
    assert found == each * (2 * m * (2 * d + 2 * C) + d * (2 * m + C))
    # Of both roles logits and their gradients, sums and pairs, averages read, asked for and changed.
    found = chosen.kernel_flops({"agent_attention_backward": 1})
    assert found == each * (6 * m * d + 5 * m * C + 4 * m * d + 2 * C * d)


@tiers.exhaustive
def test_on_hopper_it_is_the_program():
    """In this jax, under a scan and rematerialisation, documents, agents that are learned."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def loss(q, k, v, agents):
        @jax.checkpoint
        def layer(q, _):
            return q + causal_agent_attention(q, k, v, agents, DOCUMENTS, refreshed=False, chunk=16)[0], None

        return jax.lax.scan(layer, q, None, length=2)[0].astype(jnp.float32).sum()

    rows = of(1, 96, 2, 24)
    with on("NVIDIA H100 80GB HBM3", "gpu"), use_abstract_mesh(H100):
        traced = jax.jit(jax.grad(loss, range(4))).trace(rows, rows, rows, of(2, 3, 24))
        text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert "agent_attention_forward" in text and "agent_attention_backward" in text and "mosaic_gpu" in text


@tiers.parametrize("exact", [True, False], often=[False])
def test_around_the_kernel_for_gpus(monkeypatch, exact):
    """What it finds is the result where it is exact, else XLA's form; so is the gradient, through the state before and
    after, too."""
    q, k, v, agents = arrays()
    _, before = jax.jit(fixed_agent_attention)(k, q, v, agents[None])

    class Fake:
        @staticmethod
        def gpu_agent_attention(q, k, v, agents, **options):
            if exact:
                o, after = kernels.agent_attention(q, k, v, agents, interpret=True, **options)
            else:  # the state is right in any case
                o, after = fixed_agent_attention(
                    q, k, v, agents[None], before=agent_kernel._averages(*options["state"])
                )
                o, after = 2 * o, agent_kernel._logarithms(after)
            return o, after, jnp.full(o.shape[:1], exact)

    kernels = agent_kernel._kernels()
    monkeypatch.setattr(agent_kernel, "_kernels", lambda: Fake)

    def loss(inputs, run):
        o, after = run(*inputs[:3], inputs[3][None], DOCUMENTS * 0, inputs[4])
        averages = after.values_BHme / after.total_BHm[..., None]
        log = after.highest_BHm + jnp.log(after.total_BHm)
        return sum(jnp.sum(jnp.sin(x)) for x in (o, averages, log)), (o, averages, log)

    run = lambda fn: jax.jit(jax.value_and_grad(lambda x: loss(x, fn), has_aux=True))((q, k, v, agents, before))
    (total, values), grads = run(agent_kernel._on_gpus)
    (expected, expected_values), expected_grads = run(fixed_agent_attention)
    assert_same((total, values, grads[:4]), (expected, expected_values, expected_grads[:4]), 2e-5)
    assert_same(grads[4].values_BHme, expected_grads[4].values_BHme, 2e-5)
    assert_same(grads[4].total_BHm, expected_grads[4].total_BHm, 2e-5)


def test_kernel_flops():
    """Forward: logits, sums of weights, pairs and what they weigh, averages written and read."""
    each, d, m, C = 2.0 * 2 * 4096 * 16, 128, 16, 128
    with on("TPU v6e"), ops.recording() as chosen:
        CAUSAL_AGENT_ATTENTION.choose(spec())
    runs = lambda name: chosen.kernel_flops({f"agent_attention_{name}.3": 1})
    assert runs("forward") == pytest.approx(each * (4 * m * d + 2 * m * C + C * d))
    with on("TPU v6e"), ops.recording() as anew:
        CAUSAL_AGENT_ATTENTION.choose(spec(packed=False, features=("causal", "refreshed"), chunk=64))
    assert anew.kernel_flops({"agent_attention_forward": 1}) == pytest.approx(each * (4 * m * d + 2 * m * 64 + 64 * d))
    assert anew.kernel_flops({"flash_forward": 1}) == pytest.approx(4.0 * 2 * 16 * 63 * m * 4096 * d)
    assert runs("backward") == pytest.approx(each * (11 * m * d + 5 * m * C + 2 * C * d))


def arrays(length=96):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return *(normal(1, length, 2, 16) for _ in range(3)), normal(2, 3, 16)


def value_and_gradients(impl, *arrays, wrap=lambda f: f):
    def loss(arrays):
        run = lambda *a: causal_agent_attention(*a, DOCUMENTS, refreshed=False, chunk=16, impl=impl)[0]
        o = wrap(run)(*arrays)
        return jnp.sum(jnp.sin(o)), o

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@tiers.exhaustive
def test_streams():
    """Averages before and after, one agent's of nothing, are those of XLA's form; gradients through both, too."""
    q, k, v, agents = arrays()
    before = Averages.empty(1, 2, 3, 16, jnp.float32)
    _, before = fixed_agent_attention(k, q, v, agents[None], before=before)
    nothing = Averages(*(x.at[0, 0, 0].set(y) for x, y in zip(jax.tree.leaves(before), (LOWEST, 0, 0))))

    def loss(inputs, impl):
        total, values, rest = inputs
        stream = Averages(nothing.highest_BHm, total, values)
        options = {"refreshed": False, "chunk": 16, "impl": impl}
        o, after = causal_agent_attention(*rest, DOCUMENTS[:, :20], stream, **options)
        averages = after.values_BHme / after.total_BHm[..., None]
        log = after.highest_BHm + jnp.log(after.total_BHm)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(averages)) + jnp.sum(jnp.sin(log)), (o, averages, log)

    inputs = nothing.total_BHm, nothing.values_BHme, (*(x[:, :20] for x in (q, k, v)), agents)
    with interpreted():
        both = [
            jax.jit(jax.value_and_grad(lambda x, impl=impl: loss(x, impl), has_aux=True))(inputs)
            for impl in ("pallas", "chunked")
        ]
    (_, found), (_, expected) = both
    assert_same(both[0][0], both[1][0], 1e-5)
    some = lambda x: x[:, :, 1:]  # an average of nothing has no gradient that counts
    for a, b in zip(jax.tree.leaves((some(found[0]), some(found[1]), found[2])),
                    jax.tree.leaves((some(expected[0]), some(expected[1]), expected[2]))):  # fmt: skip
        assert_same(a, b, 1e-5)


def test_split_over_devices_and_remat():
    """Under checkpoint, each of four devices with a quarter of the positions and half of the heads: the same."""
    inputs = arrays()
    expected = jax.jit(lambda: value_and_gradients("definition", *inputs))()
    devices = sharding.make_mesh(MeshConfig(data=1, context=4, tensor=2), 1)
    run = lambda: value_and_gradients("pallas", *inputs, wrap=jax.checkpoint)
    with interpreted(), ops.recording() as chosen:
        split = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))()
    assert {str(c.spec) for c in chosen.choices} == {"B1 T24 H1 d16 m3 float32 packed causal fixed"}
    assert_same(split, expected, 1e-5)


@tiers.exhaustive
def test_agents_made_anew():
    """Every chunk a sweep, from what its agents find in the keys before; a length that is no multiple of chunks, and
    values of one that is less than a chunk."""
    inputs = arrays(25)

    def loss(arrays, impl):
        o, _ = causal_agent_attention(*arrays, refreshed=True, chunk=9, impl=impl)
        return jnp.sum(jnp.sin(o)), o

    few = *(x[:, :5] for x in inputs[:3]), inputs[3]
    run = lambda impl: jax.jit(lambda: (jax.value_and_grad(loss, has_aux=True)(inputs, impl), loss(few, impl)))()
    with interpreted():
        found = run("pallas")
    assert_same(found, run("definition"), 1e-5)
