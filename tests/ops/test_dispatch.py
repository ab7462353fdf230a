"""Ops: what a choice sees, that a toy implementation is one function and one line, and the record of choices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers, ops
from attnlab.errors import ConfigError, UserError
from attnlab.ops import Mask, attention, dispatch
from attnlab.ops.attention import ATTENTION, definition
from attnlab.ops.dispatch import Implementation
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, linear_recurrence
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.mixers import cases, forced, test_contract
from tests.ops import implementations, reference


def mesh(**sizes):
    return sharding.make_mesh(MeshConfig(**{"data": 1} | sizes), 8, length=64)


def traced_on(devices, fn, *arrays):
    jax.eval_shape(partition.traced(fn, devices, sharding.ACTIVATION_RULES), *arrays)


def test_a_choice_sees_what_a_device_has_in_its_own_dtype(monkeypatch):
    """On context 4 x tensor 2, of 64 positions and 4 heads in bfloat16: 16 positions and 2 heads, in bfloat16."""
    q = jnp.ones((8, 64, 4, 8), jnp.bfloat16)
    got = []

    def spy(run):
        def spied(*arrays, **options):
            got.append((arrays[0].shape, str(arrays[0].dtype)))
            return run(*arrays, **options)

        return spied

    for op in (LINEAR_RECURRENCE, ATTENTION):
        monkeypatch.setitem(op.table, "spy", Implementation(spy(op.table["definition"].run)))
    with ops.recording() as chosen:
        traced_on(mesh(context=4, tensor=2), lambda q: attention(q, q, q, Mask(causal=True), impl="spy"), q)
    (choice,) = chosen.choices
    assert str(choice.spec) == "B8 T16 S64 H2 K2 d8 bfloat16 causal devices=4"
    assert got == [((8, 16, 2, 8), "bfloat16")]

    # What devices find is added in float32: where positions are split the recurrence gets that, and its spec says so.
    for sizes, shape, dtype in (({"data": 4}, (2, 64, 2, 8), "bfloat16"), ({"context": 4}, (8, 16, 2, 8), "float32")):
        del got[:]
        with ops.recording() as chosen:
            traced_on(mesh(tensor=2, **sizes), lambda q: linear_recurrence(q, q, q, impl="spy")[0], q)
        (choice,) = chosen.choices
        assert str(choice.spec) == f"B{shape[0]} T{shape[1]} H2 d8/8 C64 {dtype} decay=none"
        assert got == [(shape, dtype)]


def test_support_is_asked_for_what_a_device_has(monkeypatch):
    """An implementation that takes 16 positions at most serves 64 that four devices share, and not those of one."""
    q = jnp.ones((8, 64, 4, 8))
    short = Implementation(definition, lambda spec: None if spec.queries <= 16 else "too long")
    monkeypatch.setitem(ATTENTION.table, "short", short)
    run = lambda q: attention(q, q, q, Mask(causal=True), impl="short")
    traced_on(mesh(context=4, tensor=2), run, q)
    with pytest.raises(UserError, match="'short' cannot serve B. T64 .*: too long"):
        traced_on(mesh(data=4, tensor=2), lambda q: run(q[:1]), q)


def toy(q, k, v, mask, sinks_H=None, *, scale, soft_cap):
    """Softmax attention, by the definition of a transposed problem."""
    o = definition(q[::-1], k[::-1], v[::-1], jax.tree.map(lambda x: x[::-1], mask), sinks_H, scale=scale,
                   soft_cap=soft_cap)  # fmt: skip
    return o[::-1]


def test_a_toy_implementation_is_one_function_and_one_line(monkeypatch):
    """It is forced by the batteries, on several devices too, selected by a config, costed, and recorded."""
    line = Implementation(toy, kernel_flops=lambda spec: {"toy_kernel": 2.0 * spec.queries})
    monkeypatch.setitem(ATTENTION.table, "toy", line)

    assert "toy" in implementations.names(ATTENTION)
    implementations.held_to_the_definition("attention", "toy")
    config = mixers.config_from_node({"name": "softmax", "impl": "toy", "kv_heads": 2})
    assert "toy" in forced.implementations(config)
    with pytest.raises(ConfigError, match="allowed: auto, definition, xla, flash, splash, cudnn, tiles, toy"):
        mixers.config_from_node({"name": "softmax", "impl": "toys"})

    graphdef, params = cases.split(cases.module(config, jnp.float32))
    x, seq = cases.inputs(jnp.float32)
    with ops.recording() as chosen:
        found = jax.jit(functools.partial(test_contract.call.__wrapped__, graphdef))(params, x, seq)
    assert list(chosen.table()["attention"].values()) == ["toy"]
    assert chosen.kernel_flops({"toy_kernel.1": 3, "other": 9}) == 3 * 2.0 * cases.LENGTH
    graphdef, params = cases.split(cases.module(dataclasses.replace(config, impl="definition"), jnp.float32))
    np.testing.assert_allclose(found, test_contract.call(graphdef, params, x, seq), atol=1e-5)


def test_a_toy_runs_where_positions_are_split(monkeypatch):
    """Attention gathers keys for whatever implementation; an op without a way of its own gathers all positions."""
    monkeypatch.setitem(ATTENTION.table, "toy", Implementation(toy))
    q = np.random.default_rng(0).standard_normal((8, 64, 4, 8)).astype(np.float32)
    run = lambda q: attention(q, q, q, Mask(causal=True), impl="toy")
    result = jax.jit(partition.traced(run, mesh(context=4, tensor=2), sharding.ACTIVATION_RULES))(q)
    np.testing.assert_allclose(result, reference.attention(q, q, q, Mask(causal=True), q)[0], atol=1e-6)

    reverse = dispatch.Op("reverse", lambda exchange, x: x.shape, {"definition": Implementation(lambda x: x[:, ::-1])},
                          ("definition",))  # fmt: skip
    rows = ("batch", "seq", "heads", None)
    run = partition.traced(
        lambda q: reverse(q, axes=(rows,), out_axes=[rows]), mesh(context=4), sharding.ACTIVATION_RULES
    )
    np.testing.assert_array_equal(jax.jit(run)(q), q[:, ::-1])


def test_recordings_nest():
    """Each gets all that is chosen in its own block, and nothing of what is chosen outside of it."""
    q = jnp.ones((1, 3, 1, 2))
    run = lambda impl: jax.eval_shape(lambda q: attention(q, q, q, Mask(), impl=impl), q)
    with ops.recording() as outer:
        run("xla")
        with ops.recording() as inner:
            run("definition")
    run("definition")
    of = lambda record: [choice.implementation for choice in record.choices]
    assert of(inner) == ["definition"] and of(outer) == ["xla", "definition"]


@pytest.mark.parametrize("name", mixers.names())
def test_costing_records_nothing(name):
    """A cost asks what would run; nothing does."""
    with ops.recording() as chosen:
        mixers.get(name).cost(mixers.get(name).Config(), 16, 8)
    assert chosen.choices == []


def test_a_kernel_of_another_platform_is_a_config_and_refused_where_it_cannot_run():
    """The config takes it; calling the layer says which platform it runs on. Auto never takes one interpreted."""
    layer = cases.module(mixers.config_from_node({"name": "softmax", "impl": "splash"}), jnp.float32)
    x, seq = cases.inputs(jnp.float32)
    with pytest.raises(UserError, match="impl='splash' cannot serve .*: it runs on tpu; the platform is cpu"):
        layer(x, seq)
    q = jnp.ones((1, 128, 1, 64))
    with dispatch.interpreted(), ops.recording() as chosen:
        jax.eval_shape(lambda q: attention(q, q, q, Mask(causal=True)), q)
        jax.eval_shape(lambda q: attention(q, q, q, Mask(causal=True), impl="splash"), q)
    assert [c.implementation for c in chosen.choices] == ["xla", "splash"]


def test_one_query_over_a_cache_has_a_knob_of_its_own():
    """`decode_impl` chooses for a stream, `impl` for whole sequences; neither touches the other."""
    config = mixers.config_from_node({"name": "softmax", "impl": "definition", "decode_impl": "xla"})
    x, seq = cases.inputs(jnp.float32)

    def run(x, seq):
        layer = cases.module(config, jnp.float32)
        state, (one, _) = layer.init_state(2, 4), mixers.Stream.start(2).extend(mixers.Sequence(seq.positions[:, :1]))
        layer(x, seq)
        layer.extend(x[:, :1], one, state)
        cases.module(dataclasses.replace(config, decode_impl="auto"), jnp.float32).extend(x[:, :1], one, state)

    with ops.recording() as chosen:
        jax.eval_shape(run, x, seq)
    assert set(chosen.table()["attention"].values()) == {"definition"}
    assert [c.implementation for c in chosen.choices if c.op == "cached_attention"] == ["xla", "one_query"]


def test_choices_are_recorded():
    q = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32)
    with ops.recording() as chosen:
        jax.eval_shape(lambda q: attention(q, q, q, Mask(causal=True, window=3)), q)
        jax.eval_shape(lambda q: attention(q, q, q, Mask(), impl="definition"), q)
    assert chosen.table() == {
        "attention": {
            "B2 T5 S5 H4 K4 d8 float32 causal window=3": "xla",
            "B2 T5 S5 H4 K4 d8 float32": "definition",
        }
    }


def test_a_named_implementation_that_cannot_serve_raises(monkeypatch):
    q = jnp.ones((2, 5, 4, 8))
    picky = Implementation(lambda q, *a, **kw: q, lambda spec: "soft_cap" if spec.soft_cap else None)
    monkeypatch.setitem(ATTENTION.table, "picky", picky)
    assert attention(q, q, q, Mask(), impl="picky") is not None
    with pytest.raises(UserError, match="impl='picky' cannot serve .*: soft_cap"):
        attention(q, q, q, Mask(), soft_cap=1.0, impl="picky")
