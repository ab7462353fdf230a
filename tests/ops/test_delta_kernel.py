"""Our kernel as an implementation of the delta rule: when it is chosen, what it gets, split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops.delta_rule import DELTA_RULE, DeltaSpec, delta_rule
from attnlab.ops.dispatch import interpreted
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests.ops.devices import on
from tests.ops.recurrences import DOCUMENTS, assert_picked, assert_same


def spec(**changes):
    facts = dict(batch=2, positions=4096, heads=16, width=128, value_width=128, dtype="bfloat16", chunk=64, packed=True)
    return DeltaSpec(**(facts | changes))


def test_auto():
    assert_picked(DELTA_RULE, spec, 64)


def test_kernel_flops():
    """Forward: overlaps, scores, errors, outputs and the inverse of pairs, three of states; backward: six and six of
    pairs, seven of states and one more of all chunks but a block's last."""
    each, d, e, C = 2.0 * 2 * 4096 * 16, 128, 128, 128
    with on("TPU v6e"), ops.recording() as chosen:
        DELTA_RULE.choose(spec())
    runs = lambda name: chosen.kernel_flops({f"delta_rule_{name}.3": 1})
    assert runs("forward") == pytest.approx(each * (C * (2 * d + 2 * e + 8 * C) + 3 * d * e))
    assert runs("backward") == pytest.approx(each * (C * (6 * d + 6 * e) + 7.5 * d * e))


def test_channels():
    """Decays of channels: names of their own, and products of keys and queries at seven sizes of joints."""
    each, d, e, C = 2.0 * 2 * 4096 * 16, 128, 128, 128
    with on("TPU v6e"), ops.recording() as chosen:
        assert DELTA_RULE.pick(spec(channels=True)) == "pallas"
        DELTA_RULE.choose(spec(channels=True))
    runs = lambda name: chosen.kernel_flops({f"delta_rule_channels_{name}.3": 1})
    assert runs("forward") == pytest.approx(each * (C * (14 * d + 2 * e + 8 * C) + 3 * d * e))
    assert runs("backward") == pytest.approx(each * (C * (42 * d + 6 * e) + 7.5 * d * e))


def arrays(length=96):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v = (normal(1, length, 2, w) for w in (16, 16, 16))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, -jnp.abs(normal(1, length, 2)), jax.nn.sigmoid(normal(1, length, 2)), normal(1, 2, 16, 16)


def value_and_gradients(impl, *arrays, wrap=lambda f: f):
    def loss(arrays):
        *inputs, state = arrays
        run = wrap(lambda *inputs: delta_rule(*inputs, documents_BT=DOCUMENTS, state_BHde=state, impl=impl))
        o, end = run(*inputs)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(end)), (o, end)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


def test_documents_states_and_remat():
    """The op's documents and states, a decay of nothing at all, under checkpoint."""
    q, k, v, log_decay, *rest = arrays()
    inputs = q, k, v, log_decay.at[0, 40].set(-jnp.inf), *rest
    expected = jax.jit(lambda *a: value_and_gradients("definition", *a))(*inputs)
    with interpreted():
        plain = jax.jit(lambda *a: value_and_gradients("pallas", *a))(*inputs)
        inside = jax.jit(lambda *a: value_and_gradients("pallas", *a, wrap=jax.checkpoint))(*inputs)
    assert_same(plain, expected, 1e-4)  # float32 sums of 126: see the kernel's `log_decay`
    assert_same(inside, plain, 1e-6)


def test_positions_split_over_devices():
    """Each of four devices has a quarter of the positions and half of the heads; the same."""
    inputs = arrays()
    devices = sharding.make_mesh(MeshConfig(data=1, context=4, tensor=2), 1)
    with interpreted(), ops.recording() as chosen:
        run = partition.traced(lambda: value_and_gradients("pallas", *inputs), devices, sharding.ACTIVATION_RULES)
        results = jax.jit(run)()
    assert {str(c.spec) for c in chosen.choices} == {"B1 T24 H1 d16/32 C64 float32 packed"}
    assert_same(results, jax.jit(lambda: value_and_gradients("definition", *inputs))(), 1e-4)
