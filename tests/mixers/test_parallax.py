"""Parallax (Zuo et al. 2026): its op and layer, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.ops import Mask, attention, blockwise, mask_from_segments
from attnlab.ops.local_linear import local_linear
from attnlab.ops.parallax import parallax
from attnlab.parallel import partition
from tests import tiers
from tests.mixers import cases

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out r", "scale": "q_norm k_norm r_norm"}
BIASED = [({}, "k q r v", "out")]
NUMBERS_OF = "softmax"

T = 45
SEGMENTS = np.array([[1] * 14 + [2] * 3 + [3] * 21 + [0] * 7, [0] * 2 + [4] * 23 + [5] * 20])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a short sequence meets several blocks."""
    for name, value in {"ROWS": 16, "BODIES": 2, "LEAST_KEYS": 16, "ALIGN": 4}.items():
        monkeypatch.setattr(blockwise, name, value)


def arrays(B=2, H=4, K=2, d=5, e=3):
    """q, r, k, v."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s)) for s in ((B, T, H, d), (B, T, H, d), (B, T, K, d), (B, T, K, e))]


def value_and_grads(impl, arguments, mask):
    do = jnp.asarray(np.random.default_rng(1).normal(size=(*arguments[0].shape[:3], arguments[3].shape[3])))

    @jax.jit
    def run(arguments, mask):
        o, vjp = jax.vjp(lambda *a: parallax(*a, mask, impl=impl), *arguments)
        return o, *vjp(do)

    return run(arguments, mask)


def assert_close(actual, expected, tolerance=1e-11):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["definition", "xla"])
def test_is_the_formula(impl):
    """The weights' mean of v less sum p (t - mean t) v, as loops."""
    q, r, k, v = arrays(B=1)
    o = parallax(q, r, k, v, Mask(causal=True), scale=0.7, impl=impl)
    for t, h in np.ndindex(12, 4):
        keys, values = (np.asarray(x)[0, : t + 1, h // 2] for x in (k, v))
        p = np.exp(0.7 * keys @ np.asarray(q)[0, t, h])
        p /= p.sum()
        tilt = keys @ np.asarray(r)[0, t, h]
        expected = p @ values - (p * (tilt - p @ tilt)) @ values
        np.testing.assert_allclose(o[0, t, h], expected, atol=1e-12)


@tiers.often("accelerator")
@pytest.mark.parametrize("kind", ["packed", "window", "accelerator"])
def test_blockwise_equals_definition(kind, small_tiles, monkeypatch):
    if kind == "accelerator":
        monkeypatch.setattr(partition, "by_platform", lambda *args, cpu, default: default(*args))
    window, causal = (9, True) if kind == "window" else (None, kind == "packed")
    mask = mask_from_segments(jnp.asarray(SEGMENTS), T, causal=causal, window=window)
    arguments = arrays(K=4 if kind == "window" else 2)
    expected = value_and_grads("definition", arguments, mask)
    assert_close(value_and_grads("xla", arguments, mask), expected)
    assert all(np.abs(x).max() > 1e-3 for x in expected)
    assert not any(np.any(np.asarray(x)[SEGMENTS == 0]) for x in expected)  # padding: no output, no gradient


@tiers.exhaustive
def test_no_probe_is_softmax_attention():
    q, r, k, v = arrays()
    assert_close([parallax(q, 0 * r, k, v, Mask(causal=True))], [attention(q, k, v, Mask(causal=True))])


@tiers.exhaustive
def test_is_softmax_attention_less_its_derivative_along_the_probe():
    """o = attention(q) - (d attention / d q) r / scale: the correction is the covariance of values and keys times r."""
    q, r, k, v = arrays()
    mask, scale = Mask(causal=True), 0.7
    f = lambda q: attention(q, k, v, mask, scale=scale, impl="definition")
    value, slope = jax.jvp(f, (q,), (r / scale,))
    assert_close([parallax(q, r, k, v, mask, scale=scale)], [value - slope])


@tiers.exhaustive
def test_solved_probe_is_local_linear_attention():
    """r = -A^-1 (q - mean key) gives local linear attention, which solves for what Parallax projects."""
    q, _, k, v = arrays(K=4)
    mask, ridge = Mask(causal=True), 0.5
    logits = jnp.where(mask.visible(T, T), jnp.einsum("bthd,bshd->bhts", q, k) * 5**-0.5, -jnp.inf)
    p = jax.nn.softmax(logits)
    mean = jnp.einsum("bhts,bshd->bthd", p, k)
    A = jnp.einsum("bhts,bshd,bshf->bthdf", p, k, k) - mean[..., None] * mean[..., None, :] + ridge * jnp.eye(5)
    r = -jnp.linalg.solve(A, (q - mean)[..., None])[..., 0]
    expected, _ = local_linear(q, k, v, mask, ridge, impl="definition")
    assert_close([parallax(q, r, k, v, mask)], [expected], 1e-9)


def test_constant_values_are_reproduced():
    """Weights sum to 1, whatever the probe."""
    q, r, k, v = arrays()
    o = parallax(q, 5 * r, k, jnp.ones_like(v), Mask(causal=True))
    assert_close([o], [np.ones(o.shape)])


def test_first_output_is_the_first_value():
    q, r, k, v = arrays(K=4)
    np.testing.assert_allclose(parallax(q, 30 * r, k, v, Mask(causal=True))[:, 0], v[:, 0], rtol=1e-13)


@tiers.exhaustive
def test_translation_of_keys_changes_nothing():
    """It moves a row's logits and its second scores by one number each."""
    q, r, k, v = arrays()
    plain, moved = (parallax(q, r, k + c, v, Mask(causal=True)) for c in (0.0, jnp.arange(5.0)))
    assert_close([moved], [plain], 1e-10)


@tiers.exhaustive
def test_the_past_is_bitwise_the_same_whatever_the_future(small_tiles):
    arguments = [x.astype(jnp.float32) for x in arrays()]
    run = jax.jit(lambda *a: parallax(*a, Mask(causal=True)))
    before = np.asarray(run(*arguments))
    for t in (1, 20, T - 1):
        after = np.asarray(run(*(x.at[:, t:].multiply(-3.0) for x in arguments)))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


def test_a_probe_of_another_shape_is_refused():
    q, r, k, v = arrays()
    with pytest.raises(UserError, match="must be like q"):
        parallax(q, r[..., :2], k, v, Mask())


# The layer.


@tiers.exhaustive
@pytest.mark.parametrize("qk_norm", [True, False])
def test_zero_projection_of_probes_is_the_softmax_layer(qk_norm):
    module = cases.module(mixers.get("parallax").Config(kv_heads=2, qk_norm=qk_norm), jnp.float64)
    module.r.kernel[...] = jnp.zeros_like(module.r.kernel[...])
    softmax = cases.module(mixers.get("softmax").Config(kv_heads=2, qk_norm=qk_norm), jnp.float64)
    for name in ("q", "k", "v", "out"):
        getattr(softmax, name).kernel[...] = getattr(module, name).kernel[...]
    for name in ("q_norm", "k_norm") if qk_norm else ():
        getattr(softmax, name).scale[...] = getattr(module, name).scale[...]
    x, seq = cases.inputs(jnp.float64)
    np.testing.assert_allclose(cases.output(module, x, seq), cases.output(softmax, x, seq), atol=1e-12)


def test_relative_positions():
    """Probes turn with the keys: shifting all positions changes nothing."""
    module = cases.module(mixers.get("parallax").Config(), jnp.float64)
    x, _ = cases.inputs(jnp.float64)
    seq = mixers.Sequence.whole(*x.shape[:2])
    shifted = mixers.Sequence(seq.positions + 1000)
    np.testing.assert_allclose(cases.output(module, x, shifted), cases.output(module, x, seq), atol=1e-10)


@tiers.exhaustive
def test_size_of_normalised_probes_does_not_matter():
    """With qk_norm the probe has the length of a normalised head whatever W_R."""
    module = cases.module(mixers.get("parallax").Config(), jnp.float64)
    x, seq = cases.inputs(jnp.float64)
    before = cases.output(module, x, seq)
    module.r.kernel[...] = 1e3 * module.r.kernel[...]
    np.testing.assert_allclose(cases.output(module, x, seq), before, rtol=0, atol=1e-4 * float(jnp.abs(before).max()))


@tiers.exhaustive
def test_gradients_reach_the_probes():
    graphdef, params = cases.split(cases.module(mixers.get("parallax").Config(), jnp.float64))
    x, seq = cases.inputs(jnp.float64)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x, seq).y))))(params)
    assert np.abs(gradient["r"]["kernel"][...]).min() > 0


@pytest.mark.parametrize(
    "fields, message",
    [({"sinks": True}, "unknown key"), ({"soft_cap": 3.0}, "unknown key"), ({"impl": "cg"}, "impl = 'cg'")],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixers.config_from_node({"name": "parallax", **fields})
