"""Our kernel as an implementation of the linear recurrence: when it is chosen, what it gets, split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops.dispatch import interpreted
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE, RecurrenceSpec, linear_recurrence
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.ops.devices import on
from tests.ops.recurrences import DOCUMENTS, assert_picked, assert_same


def spec(**changes):
    facts = dict(batch=2, positions=4096, heads=16, width=128, value_width=129, dtype="bfloat16", chunk=64,
                 decay="data", packed=True)  # fmt: skip
    return RecurrenceSpec(**(facts | changes))


def test_auto():
    assert_picked(LINEAR_RECURRENCE, spec, 128)


def test_kernel_flops():
    """Forward: scores, what they weigh, what is read and written; backward: 3 d + 2 e of pairs, five of states and one
    more of all chunks but a block's last."""
    each, d, e, C = 2.0 * 2 * 4096 * 16, 128, 129, 128
    with on("TPU v6e"), ops.recording() as chosen:
        LINEAR_RECURRENCE.choose(spec())
    runs = lambda name: chosen.kernel_flops({f"linear_recurrence_{name}.3": 1})
    assert runs("forward") == pytest.approx(each * (C * (d + e) + 2 * d * e))
    assert runs("backward") == pytest.approx(each * (C * (3 * d + 2 * e) + 4.875 * d * e))


def test_kernel_flops_where_heads_share_queries_and_keys():
    """Scores once for each group of 8 heads forward, of 4 backward; blocks of 4 chunks. The spec is of the arrays."""
    of = lambda heads, width: jax.ShapeDtypeStruct((2, 4096, heads, width), jnp.bfloat16)
    logs, documents = jax.ShapeDtypeStruct((2, 4096, 16), jnp.float32), jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    shared = RecurrenceSpec.of(None, of(1, 128), of(1, 128), of(16, 129), logs, documents, None, chunk=64)
    assert shared == spec(shared=True)
    each, d, e, C = 2.0 * 2 * 4096 * 16, 128, 129, 128
    with on("TPU v6e"), ops.recording() as chosen:
        LINEAR_RECURRENCE.choose(shared)
    runs = lambda name: chosen.kernel_flops({f"linear_recurrence_{name}.3": 1})
    assert runs("forward") == pytest.approx(each * (C * (d / 8 + e) + 2 * d * e))
    assert runs("backward") == pytest.approx(each * (C * ((2 + 1 / 4) * d + 2 * e) + 4.75 * d * e))


def arrays(length=96):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, u = (normal(1, length, 2, w) for w in (16, 16, 16))
    return q, k, u, -np.abs(normal(1, length, 2)), normal(1, 2, 16, 16)


def value_and_gradients(impl, *arrays, wrap=lambda f: f):
    def loss(arrays):
        q, k, u, log_decay, state = arrays
        run = wrap(
            lambda q, k, u: linear_recurrence(
                q, k, u, log_decay=log_decay, documents_BT=DOCUMENTS, state_BHde=state, impl=impl
            )
        )
        o, end = run(q, k, u)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(end)), (o, end)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@tiers.exhaustive
def test_documents_states_and_remat():
    """The op's documents and states, a decay of nothing at all, under checkpoint and a scan over layers."""
    q, k, u, log_decay, state = arrays()
    log_decay[0, 40] = -np.inf
    expected = jax.jit(lambda *a: value_and_gradients("definition", *a))(q, k, u, log_decay, state)

    def layers(f):
        def step(carry, _):
            return carry, jax.checkpoint(f)(q, *carry)

        def run(q_, k, u):
            del q_
            _, (o, end) = jax.lax.scan(step, (k, u), jnp.arange(1))
            return o[0], end[0]

        return run

    with interpreted():
        plain = jax.jit(lambda *a: value_and_gradients("pallas", *a))(q, k, u, log_decay, state)
        inside = jax.jit(lambda *a: value_and_gradients("pallas", *a, wrap=layers))(q, k, u, log_decay, state)
    assert_same(plain, expected, 1e-4)  # both have float32 sums of 126 and of 87: see the kernel's `log_decay`
    (loss, out), gradients = inside
    assert_same((loss, out, gradients[1:]), (plain[0][0], plain[0][1], plain[1][1:]), 1e-5)


def test_positions_split_over_devices():
    """The op's documents and states, a decay of nothing at all, under checkpoint, where each of four devices has a
    quarter of the positions and half of the heads; the same."""
    inputs = arrays()
    inputs[3][0, 40] = -np.inf
    devices = sharding.make_mesh(MeshConfig(data=1, context=4, tensor=2), 1)
    run = lambda: value_and_gradients("pallas", *inputs, wrap=jax.checkpoint)
    with interpreted(), ops.recording() as chosen:
        results = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))()
    assert {str(c.spec) for c in chosen.choices} == {"B1 T24 H1 d16/16 C64 float32 decay=data packed"}
    # float32 sums of 126 and of 87: see the kernel's `log_decay`
    assert_same(results, jax.jit(lambda: value_and_gradients("definition", *inputs))(), 1e-4)
