"""Our kernel as an implementation of the delta rule: when it is chosen, what it gets, split over devices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from attnlab import ops
from attnlab.errors import UserError
from attnlab.ops.delta_rule import DELTA_RULE, DeltaSpec, delta_rule
from attnlab.ops.dispatch import interpreted
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.ops.devices import on
from tests.ops.recurrences import DOCUMENTS, H100, assert_picked, assert_same


def spec(**changes):
    facts = dict(batch=2, positions=4096, heads=16, width=128, value_width=128, dtype="bfloat16", chunk=64, packed=True)
    return DeltaSpec(**(facts | changes))


def test_auto():
    assert_picked(DELTA_RULE, spec, 64)


def test_auto_on_gpus():
    """On Hopper the kernel, with its FLOPs; XLA's form takes other GPUs, other types, wider keys, and less than a
    chunk, each but the last with its reason."""
    with on("NVIDIA H100 80GB HBM3", "gpu"), ops.recording() as chosen:
        assert DELTA_RULE.choose(spec(value_width=512)) and chosen.choices[0].implementation == "pallas"
        for says, change in {"not float32": {"dtype": "float32"}, "at most 128 wide, not 136": {"width": 136}}.items():
            assert DELTA_RULE.pick(spec(**change)) == "chunked"
            with pytest.raises(UserError, match=says):
                DELTA_RULE.pick(spec(**change), "pallas")
        assert DELTA_RULE.pick(spec(positions=63)) == "chunked" and DELTA_RULE.pick(spec(positions=64)) == "pallas"
    with on("NVIDIA A100-SXM4-80GB", "gpu"):
        assert DELTA_RULE.pick(spec()) == "chunked"
        with pytest.raises(UserError, match="for Hopper, not NVIDIA A100"):
            DELTA_RULE.pick(spec(), "pallas")
    each, d, e, C = 2.0 * 2 * 4096 * 16, 128, 512, 64
    runs = lambda name: chosen.kernel_flops({f"delta_rule_{name}": 1})
    # The inverse is ten products; the states' kernels have three of states and two of pairs; the last has, of pairs,
    # two over values and four over keys.
    assert runs("pairs") == each * C * (2 * d + 10 * C)
    assert runs("forward") == runs("backward_states") == each * (3 * d * e + 2 * C * e)
    assert runs("backward_chunks") == each * (3 * d * e + C * (2 * e + 4 * d))


def test_on_hopper_it_is_the_program():
    """In this jax, under a scan and rematerialisation, documents, a state, widths and a length that fill no tile: two
    kernels a direction."""
    of = lambda width, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 96, 2, width)[: 4 if width else 3], dtype)
    state = jax.ShapeDtypeStruct((1, 2, 24, 72), jnp.float32)

    def loss(q, k, v, log_decay, beta, state):
        @jax.checkpoint
        def layer(q, _):
            o, end = delta_rule(q, k, v, log_decay, beta, documents_BT=DOCUMENTS, state_BHde=state)
            return q + o.sum() + end.sum().astype(q.dtype), None

        return jax.lax.scan(layer, q, None, length=2)[0].astype(jnp.float32).sum()

    with on("NVIDIA H100 80GB HBM3", "gpu"), use_abstract_mesh(H100):
        gates = of(0, jnp.float32), of(0, jnp.float32)
        traced = jax.jit(jax.grad(loss, range(6))).trace(of(24), of(24), of(72), *gates, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    names = {"delta_rule_pairs", "delta_rule_forward", "delta_rule_backward_states", "delta_rule_backward_chunks"}
    assert set(re.findall(r"\bdelta_rule_(?:pairs|forward|backward)\w*", text)) == names and "mosaic_gpu" in text


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
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, v = (normal(1, length, 2, w) for w in (16, 16, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, -np.abs(normal(1, length, 2)), 1 / (1 + np.exp(normal(1, length, 2))), normal(1, 2, 16, 16)


def value_and_gradients(impl, *arrays, wrap=lambda f: f):
    def loss(arrays):
        *inputs, state = arrays
        run = wrap(lambda *inputs: delta_rule(*inputs, documents_BT=DOCUMENTS, state_BHde=state, impl=impl))
        o, end = run(*inputs)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(end)), (o, end)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@tiers.exhaustive
def test_documents_states_and_remat():
    """The op's documents and states, a decay of nothing at all, under checkpoint."""
    q, k, v, log_decay, *rest = arrays()
    log_decay[0, 40] = -np.inf
    inputs = q, k, v, log_decay, *rest
    expected = jax.jit(lambda *a: value_and_gradients("definition", *a))(*inputs)
    with interpreted():
        plain = jax.jit(lambda *a: value_and_gradients("pallas", *a))(*inputs)
        inside = jax.jit(lambda *a: value_and_gradients("pallas", *a, wrap=jax.checkpoint))(*inputs)
    assert_same(plain, expected, 1e-4)  # float32 sums of 126: see the kernel's `log_decay`
    assert_same(inside, plain, 1e-6)


def test_positions_split_over_devices():
    """The op's documents and states, a decay of nothing at all, under checkpoint, where each of four devices has a
    quarter of the positions and half of the heads; the same."""
    inputs = arrays()
    inputs[3][0, 40] = -np.inf
    devices = sharding.make_mesh(MeshConfig(data=1, context=4, tensor=2), 1)
    run = lambda: value_and_gradients("pallas", *inputs, wrap=jax.checkpoint)
    with interpreted(), ops.recording() as chosen:
        results = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))()
    assert {str(c.spec) for c in chosen.choices} == {"B1 T24 H1 d16/32 C64 float32 packed"}
    # float32 sums of 126: see the kernel's `log_decay`
    assert_same(results, jax.jit(lambda: value_and_gradients("definition", *inputs))(), 1e-4)
