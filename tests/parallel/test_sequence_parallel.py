"""Positions split over devices: what a device is given of the others, and that work is shared out evenly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.ops import Mask, attention
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.documents import document_index
from attnlab.ops.dplr import dplr
from attnlab.ops.flow_attention import flow_attention
from attnlab.ops.flow_definition import FlowRule
from attnlab.ops.linear_recurrence import linear_recurrence
from attnlab.ops.value_decay import value_decay
from attnlab.parallel import partition, sequence_parallel
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.mixers import test_contract
from tests.train import runs

ROWS = ("batch", "seq", None)


def mesh(**sizes):
    return sharding.make_mesh(MeshConfig(**{"data": 1} | sizes), 8, length=16)


def on_devices(fn, *arrays, out=ROWS, **sizes):
    """`fn` on each device's part of arrays [B, T, ...]."""
    axes = tuple(ROWS[: a.ndim] for a in arrays)
    run = partition.traced(lambda *xs: partition.local(fn, xs, axes, out), mesh(**sizes), sharding.ACTIVATION_RULES)
    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_zigzag_is_as_much_causal_work_everywhere(count):
    """Each device's positions see as many keys in sum as any other's; undoing restores the order."""
    T = 16
    position = jnp.arange(T)[None, :, None]

    def work(x):
        ordered = sequence_parallel.here().zigzag(x)
        assert ordered.shape == x.shape
        return jnp.broadcast_to((ordered + 1).sum(), x.shape)

    seen = np.unique(on_devices(work, position, context=count))
    assert seen.tolist() == [T * (T + 1) // 2 // count]
    there_and_back = lambda x: sequence_parallel.here().zigzag(sequence_parallel.here().zigzag(x), undo=True)
    np.testing.assert_array_equal(on_devices(there_and_back, position, context=count), position)


def _recurrence(name):
    """An op that is linear in its state, of five arrays alike, keys short enough for it to stay bounded."""
    ops = {
        "delta_rule": lambda q, k, v, g, b, **rest: delta_rule(q, k, v, g[..., 0], jax.nn.sigmoid(b[..., 0]), **rest),
        "dplr": lambda q, k, v, g, b, **rest: dplr(q, k, v, g, b, k, **rest),
        "value_decay": lambda q, k, v, g, b, *, state_BHde, **rest: value_decay(
            q, k, v, g, state_BHdm=state_BHde, **rest
        ),
    }
    return lambda q, k, v, g, b, state, documents: ops[name](
        q, k / 3, v, -jnp.abs(g) / 4, b / 3, state_BHde=state, documents_BT=documents, chunk=3
    )


@tiers.parametrize("name", ["delta_rule", "dplr", "value_decay"], often=["delta_rule", "value_decay"])
def test_states_go_through_several_devices(name):
    """Four parts of a row: a state from before, documents that cross one part and that cross three, and gradients."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((2, 16, 2, 3)) for _ in range(5)]
        arrays.append(rng.standard_normal((2, 2, 3, 3)))
        documents = np.asarray([[0] * 16, [0] * 2 + [1] * 3 + [2] * 11], np.int32)

        def scalar(*arrays):
            o, state = _recurrence(name)(*arrays, documents)
            return jnp.sum(jnp.sin(o) * jnp.arange(16)[:, None, None]) + jnp.sum(jnp.sin(state)), (o, state)

        both = jax.value_and_grad(scalar, argnums=tuple(range(6)), has_aux=True)
        found = jax.jit(partition.traced(both, mesh(context=4, tensor=2), sharding.ACTIVATION_RULES))(*arrays)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(both)(*arrays)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


def test_exclusive_scan_is_what_stands_before_each_run():
    """A sum with decay over four parts, from a start."""
    x = np.random.default_rng(0).random((2, 16, 3))
    decay = np.array([0.5, 0.25, 2.0, 0.125])

    def before(x):
        ours = sequence_parallel.here()
        own = jnp.asarray(decay)[ours.index()], x.sum(1)
        join = lambda before, own: own[0] * before + own[1]
        return jnp.broadcast_to(ours.exclusive_scan(join, own, jnp.ones((x.shape[0], 3)))[0][:, None], x.shape)

    found = np.asarray(on_devices(before, jnp.asarray(x), context=4, data=2))[:, ::4]
    state = np.ones((2, 3))
    for part in range(4):
        np.testing.assert_allclose(found[:, part], state, rtol=1e-6)
        state = decay[part] * state + x[:, 4 * part : 4 * part + 4].sum(1)


def test_documents_are_counted_from_the_one_that_goes_on():
    """0 where a part continues the document in which the part before ended; documents that begin count from 1."""
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4]])
    local = on_devices(
        lambda d: sequence_parallel.here().local_documents(d), document_index(segments), out=ROWS[:2], context=4
    )
    np.testing.assert_array_equal(local[0].reshape(4, 4), [[1, 1, 1, 1], [0, 1, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1]])


def test_hand_over_is_the_recurrence():
    """A recurrence in no way linear, over four parts and three rows: values, the last state and gradients."""
    x = np.random.default_rng(0).standard_normal((3, 16, 2)).astype(np.float32)
    states = np.ones((3, 2), np.float32)

    def step(state, x):  # one row's positions
        def one(h, x):
            h = jnp.tanh(h * x) + x
            return h, h

        state, out = jax.lax.scan(one, state, x.swapaxes(0, 1))
        return state, out.swapaxes(0, 1)

    def whole(x, states):
        return step(states, x)[::-1]

    def split(x, states):
        on_device = lambda x, s: sequence_parallel.here().hand_over(step, s, x)[::-1]
        axes = ((None, "seq", None), (None, None))
        return partition.local(on_device, (x, states), axes, list(axes))

    loss = lambda run: lambda *a: sum(jnp.sum(jnp.sin(y + 1)) for y in run(*a))
    both = lambda run: lambda *a: (run(*a), jax.grad(loss(run), (0, 1))(*a))
    expected = jax.jit(both(whole))(x, states)
    found = jax.jit(partition.traced(both(split), mesh(context=4), sharding.ACTIVATION_RULES))(x, states)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_attention_gathers_keys_and_values_only():
    """The only arrays that a device collects whole are keys and values; gradients go back to their owners summed."""
    q, k = jnp.ones((2, 16, 4, 6)), jnp.ones((2, 16, 2, 6))
    f = lambda q, k, v: attention(q, k, v, Mask(causal=True)).sum()
    devices = mesh(context=4, data=2)
    run = jax.jit(partition.traced(jax.grad(f, (0, 1, 2)), devices, sharding.ACTIVATION_RULES))
    placed = jax.device_put((q, k, k), sharding.batch_sharding(devices))
    text = run.lower(*placed).compile().as_text()
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\])\S* all-gather", text)
    assert gathered and all(shape.endswith("16,2,6]") for shape in gathered), gathered
    assert "reduce-scatter" in text


@tiers.often("False")
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_flow_adds_up_what_devices_hold(packed):
    """Sums over all positions, and the softmax over all sources, are of the whole row: values and gradients."""
    q, k, v = (jnp.asarray(np.random.default_rng(i).random((2, 16, 2, 3)), jnp.float32) for i in range(3))
    documents = document_index(jnp.asarray([[1] * 5 + [2] * 11, [3] * 16])) if packed else None

    def both(q, k, v):
        run = lambda *a: flow_attention(*a, FlowRule(), causal=False, documents=documents, chunk=4)
        scalar = lambda *a: (lambda out: (jnp.sum(jnp.sin(out.o)) + jnp.sum(jnp.cos(out.outgoing)), out.o))(run(*a))
        return jax.value_and_grad(scalar, (0, 1, 2), has_aux=True)(q, k, v)

    found = jax.jit(partition.traced(both, mesh(context=4, data=2), sharding.ACTIVATION_RULES))(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(both)(q, k, v)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_recurrence_with_decays_of_channels():
    """Values, the state after and gradients are those of one device, with documents, a state, channels that keep
    nothing, and the bonus."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    B, T, H, d, e = 2, 16, 2, 4, 3
    arrays = normal(B, T, H, d), normal(B, T, H, d), normal(B, T, H, e), normal(B, H, d, e), normal(H, d)
    logs = np.where(rng.random((B, T, H, d)) < 0.05, -np.inf, -rng.exponential(0.3, (B, T, H, d)))
    documents = document_index(jnp.asarray([[1] * 5 + [2] * 11, [1] * 8 + [2] + [3] * 7]))

    def both(logs, q, k, u, state, bonus):
        def scalar(logs, q, k, u, state, bonus):
            more = {"documents_BT": documents, "state_BHde": state, "bonus_Hd": bonus, "chunk": 4}
            o, end = linear_recurrence(q, k, u, log_decay=logs, **more)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(end)), (o, end)

        return jax.value_and_grad(scalar, tuple(range(6)), has_aux=True)(logs, q, k, u, state, bonus)

    given = logs.astype(np.float32), *arrays
    found = jax.jit(partition.traced(both, mesh(context=4, data=2), sharding.ACTIVATION_RULES))(*given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(both)(*given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


VARIANTS = (
    ("titans", {"variant": "mac", "depth": 1, "window": 4, "chunk": 2, "persistent": 2}),
    ("moh", {"router": "norm", "core": {"name": "gated", "kv_heads": 2, "sinks": True}}),
    ("flow", {"clip": None, "form": "averages"}),
)


@tiers.exhaustive
@tiers.parametrize("name, fields", VARIANTS, often=VARIANTS[1:2], ids=[f"{n}-{i}" for i, (n, _) in enumerate(VARIANTS)])
def test_variants_that_split_otherwise(name, fields):
    """Law 6 where the default says nothing: other states are handed on, other sums exchanged."""
    with jax.enable_x64(True):
        test_contract.same_on_eight_devices(mixers.config_from_node({"name": name, **fields}))


def test_what_cannot_be_split_is_refused_before_anything_runs():
    """Pooled agents cannot split their positions, and a length must be a multiple of the parts."""
    with pytest.raises(ConfigError, match="mesh.context = 4: model.mixers.M .agent, as configured. cannot split"):
        runs.config("stdlib", model__mixers__M={"name": "agent", "form": "pooled", "chunk": 16}, mesh__context=4)
    with pytest.raises(ConfigError, match="mesh.context = 8 does not divide data.length = 12"):
        sharding.make_mesh(MeshConfig(data=1, context=8), 8, length=12)
