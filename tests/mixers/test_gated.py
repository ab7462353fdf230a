"""The identities of gated attention (Qiu et al. 2025), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.mixers.sequence import Sequence
from attnlab.ops import recording
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out gate.linear", "bias": "gate.theta sinks", "scale": "q_norm k_norm"}
NUMBERS_OF = "softmax"
WRITTEN_OUT = True


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("gated").Config(**fields), jnp.float64)


def plain(gated):
    """Softmax attention with the gated layer's other weights."""
    c = gated.config
    softmax = cases.module(
        mixers.get("softmax").Config(heads=c.heads, kv_heads=c.kv_heads, qk_norm=c.qk_norm), jnp.float64
    )
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(gated, name).kernel[...]
    return softmax


def heads(module, x, seq):
    """What enters the output projection [B, T, H * d]; the projection's place is taken by a recorder."""
    projection, seen = module.out, []
    module.out = lambda o: seen.append(o) or projection(o)
    try:
        return np.asarray(jax.jit(lambda x: (module(x, seq), seen[0])[1])(x))
    finally:
        module.out = projection


def set_theta(gated, value):
    gated.gate.theta[...] = jnp.broadcast_to(jnp.asarray(value), gated.gate.theta.shape)


@tiers.often("2-G2")
@pytest.mark.parametrize("position", ["G1", "G2", "G3", "G4", "G5"])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_gate_of_one_is_softmax(position, kv_heads):
    """A score of 1 everywhere leaves softmax attention."""
    gated = make(position=position, kv_heads=kv_heads, input_dependent=False)
    set_theta(gated, 800.0)  # sigmoid(800) is 1 exactly
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(cases.output(gated, x, seq), cases.output(plain(gated), x, seq), atol=1e-13)


@tiers.exhaustive
def test_zero_weights_halve_exactly():
    """W = 0 gives exactly half of softmax's heads, before the projection."""
    gated = make()
    gated.gate.linear.kernel[...] = jnp.zeros_like(gated.gate.linear.kernel[...])
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_array_equal(heads(gated, x, seq), 0.5 * heads(plain(gated), x, seq))


@tiers.often("additive-G3")
@pytest.mark.parametrize("position", ["G1", "G2", "G3", "G4"])
@pytest.mark.parametrize("operation", ["multiplicative", "additive"])
def test_headwise_is_elementwise_with_repeated_columns(position, operation):
    head = make(position=position, granularity="headwise", operation=operation)
    element = make(position=position, operation=operation)
    for name in ("q", "k", "v", "out"):
        getattr(element, name).kernel[...] = getattr(head, name).kernel[...]
    element.gate.linear.kernel[...] = jnp.repeat(head.gate.linear.kernel[...], element.head_dim, axis=1)
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(cases.output(element, x, seq), cases.output(head, x, seq), atol=1e-12)


@tiers.exhaustive
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_constant_gate_on_outputs_is_the_same_on_values(granularity):
    """A score that depends on no position commutes with the average over keys: G1 = G2."""
    outputs = make(input_dependent=False, granularity=granularity)
    values = make(input_dependent=False, granularity=granularity, position="G2")
    for name in ("q", "k", "v", "out"):
        getattr(values, name).kernel[...] = getattr(outputs, name).kernel[...]
    values.gate.theta[...] = outputs.gate.theta[...]
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(values(x, seq).y, outputs(x, seq).y, atol=1e-12)


@tiers.exhaustive
def test_one_token_sees_only_itself():
    """On a sequence of one token query and key token coincide: G1 = G2."""
    outputs, values = make(), make(position="G2")
    for name in ("q", "k", "v", "out"):
        getattr(values, name).kernel[...] = getattr(outputs, name).kernel[...]
    values.gate.linear.kernel[...] = outputs.gate.linear.kernel[...]
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(2, 1)
    np.testing.assert_allclose(values(x[:, :1], seq).y, outputs(x[:, :1], seq).y, atol=1e-12)


@tiers.exhaustive
def test_closed_gate_prunes_the_head():
    """A score of 0 for a head is the layer without it."""
    gated = make(input_dependent=False, granularity="headwise")
    set_theta(gated, jnp.asarray([800.0, -800.0, 800.0, 800.0]))
    softmax = plain(gated)
    d = gated.head_dim
    softmax.out.kernel[...] = softmax.out.kernel[...].at[d : 2 * d].set(0.0)
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(gated(x, seq).y, softmax(x, seq).y, atol=1e-13)


def test_additive_identity_is_linear_on_top_of_softmax():
    """Y + x W: the gate's part of the output is x W W_O."""
    gated = make(operation="additive", activation="identity")
    x, seq = cases.inputs(jnp.float64)[0], mixers.Sequence.whole(2, cases.LENGTH)
    linear = np.asarray(x) @ np.asarray(gated.gate.linear.kernel[...]) @ np.asarray(gated.out.kernel[...])
    ungated = plain(gated)
    y, without = jax.jit(lambda x: (gated(x, seq).y, ungated(x, seq).y))(x)
    np.testing.assert_allclose(y, np.asarray(without) + linear, atol=1e-12)


@tiers.often("elementwise")
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_shared_scores_are_the_mean_over_heads(granularity):
    gated = make(sharing="shared", granularity=granularity)
    x, seq = cases.inputs(jnp.float64)
    scores = jax.nn.sigmoid(x @ gated.gate.linear.kernel[...]).reshape(*x.shape[:2], 4, -1).mean(2, keepdims=True)
    before = heads(plain(gated), x, seq).reshape(*x.shape[:2], 4, -1)
    np.testing.assert_allclose(heads(gated, x, seq), (before * scores).reshape(*x.shape), atol=1e-12)


@tiers.often("ns_sigmoid-<lambda>")
@pytest.mark.parametrize(
    "activation, function",
    [
        ("sigmoid", lambda z: 1 / (1 + np.exp(-z))),
        ("silu", lambda z: z / (1 + np.exp(-z))),
        ("ns_sigmoid", lambda z: 0.5 + 0.5 / (1 + np.exp(-z))),
        ("identity", lambda z: z),
    ],
)
def test_activations(activation, function):
    """The score is the activation written out."""
    gated = make(activation=activation)
    x, seq = cases.inputs(jnp.float64)
    scores = function(np.asarray(x @ gated.gate.linear.kernel[...]))
    np.testing.assert_allclose(heads(gated, x, seq), heads(plain(gated), x, seq) * scores, atol=1e-12)


def test_gate_after_projection():
    """G5 multiplies the layer's output."""
    gated = make(position="G5")
    x, seq = cases.inputs(jnp.float64)
    scores = jax.nn.sigmoid(x @ gated.gate.linear.kernel[...])
    np.testing.assert_allclose(gated(x, seq).y, plain(gated)(x, seq).y * scores, atol=1e-12)


def test_scale_of_a_head_is_lost_in_qk_norm():
    """Why a headwise gate on queries or keys with qk_norm is refused: the norm divides it out."""
    with pytest.raises(ConfigError, match="cancels"):
        mixers.get("gated").Config(position="G4", granularity="headwise", qk_norm=True)
    x, _ = cases.inputs(jnp.float64)
    norm = make(qk_norm=True).q_norm
    np.testing.assert_allclose(norm(50.0 * x[..., :4]), norm(100.0 * x[..., :4]), atol=1e-6)


def test_gradient_of_the_gate():
    """dL/dW = x^T (s' * Y * dL/dY') with Y the heads' outputs."""
    gated = make()
    x, seq = cases.inputs(jnp.float64)
    y = heads(plain(gated), x, seq)
    z = x @ gated.gate.linear.kernel[...]
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float64).reshape(x.shape))
    upstream = weights @ gated.out.kernel[...].T
    s = jax.nn.sigmoid(z)
    expected = jnp.einsum("btd,bte->de", x, s * (1 - s) * y * upstream)

    graphdef, params = cases.split(gated)
    loss = lambda p: jnp.sum(weights * nnx.merge(graphdef, p)(x, seq).y)
    got = jax.jit(jax.grad(loss))(params)["gate"]["linear"]["kernel"][...]
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"position": "G6"}, "position = 'G6'"),
        ({"position": "G5", "granularity": "headwise"}, "elementwise at G5"),
        ({"position": "G5", "sharing": "shared"}, "specific at G5"),
        ({"activation": "relu"}, "sigmoid, silu"),
        ({"granularity": "head"}, "did you mean 'headwise'"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "gated", **fields})


@pytest.mark.parametrize("fields, fused", [
    ({}, True), ({"granularity": "headwise"}, False), ({"activation": "silu"}, False), ({"position": "G2"}, False),
    ({"operation": "additive"}, False), ({"sharing": "shared"}, False), ({"input_dependent": False}, False),
])  # fmt: skip
def test_attention_applies_the_gate_that_its_kernel_knows(fields, fused):
    """The default's, and no other; the output is the same as where the gate comes behind."""
    module, seq = make(heads=2, **fields), Sequence(jnp.arange(7, dtype=jnp.int32)[None])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, cases.WIDTH)))
    with recording() as chosen:
        jax.eval_shape(lambda x: module(x, seq).y, x)
    assert set(chosen.table()) == {"gated_attention" if fused else "attention"}
    if fused:
        gate = np.asarray(module.gate.logits(x))
        found, softmax = (heads(each, x, seq).reshape(gate.shape) for each in (module, plain(module)))
        np.testing.assert_allclose(found, softmax / (1 + np.exp(-gate)), rtol=1e-12)
