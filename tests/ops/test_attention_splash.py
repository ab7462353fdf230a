"""The TPU kernel of softmax attention, interpreted: against the definition, documents included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, attention, attention_splash, mask_from_segments
from attnlab.ops.attention import ATTENTION
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.dispatch import interpreted
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from tests import tiers
from tests.ops import reference

T, H, K, WIDTH = 256, 4, 2, 64
# Three documents, one of a single position, padding between and after them; a row that begins with padding.
SEGMENTS = np.array([[1] * 130 + [2] + [0] * 9 + [3] * 100 + [0] * 16, [0] * 3 + [4] * 253])
MASKS = {
    "causal": lambda: (Mask(causal=True), None),
    "packed, capped": lambda: (mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True), 5.0),
    "packed window": lambda: (mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True, window=40), None),
    "packed both ways": lambda: (mask_from_segments(jnp.asarray(SEGMENTS), T, causal=False), None),
}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    shapes = (2, T, H, WIDTH), (2, T, K, WIDTH), (2, T, K, WIDTH), (2, T, H, WIDTH)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


@tiers.parametrize("name", MASKS, often=["packed, capped"])
def test_values_and_gradients(name):
    """Those of the definition; padding gives 0 and takes no gradient."""
    mask, cap = MASKS[name]()
    q, k, v, do = arrays()

    options = {"scale": WIDTH**-0.5, "soft_cap": cap, "sinks_H": None, "interpret": True}

    @jax.jit
    def run(q, k, v):
        o, vjp = jax.vjp(lambda *qkv: attention_splash.attention(*qkv, mask, **options), q, k, v)
        return o, *vjp(jnp.asarray(do))

    results = run(q, k, v)
    for a, b in zip(results, reference.attention(q, k, v, mask, do, soft_cap=cap), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    if name.startswith("packed"):
        for x in results:
            assert not np.any(np.asarray(x)[SEGMENTS == 0])


@tiers.exhaustive
@tiers.parametrize("name", MASKS, often=["packed window"])
def test_queries_split_over_devices(name):
    """The same where each device has a quarter of the queries, those of causal attention dealt out."""
    mask, cap = MASKS[name]()
    q, k, v, do = (np.concatenate([x, x[:, ::-1]], 1) for x in arrays())
    if mask.dynamic():
        twice = jnp.asarray(np.concatenate([SEGMENTS, SEGMENTS], 1))
        mask = mask_from_segments(twice, 2 * T, causal=mask.causal, window=mask.window)

    def run(impl):
        o, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, mask, soft_cap=cap, impl=impl), q, k, v)
        return o, *vjp(do)

    devices = sharding.make_mesh(MeshConfig(data=1, context=4), 1)
    with interpreted():
        results = jax.jit(partition.traced(lambda: run("splash"), devices, sharding.ACTIVATION_RULES))()
    expected = jax.jit(lambda: run("definition"))()
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def spec(**changes):
    facts = dict(batch=2, queries=T, keys=T, heads=H, kv_heads=K, width=64, value_width=64, dtype="bfloat16",
                 causal=True, window=None, intervals=False, soft_cap=False, sinks=False)  # fmt: skip
    return AttentionSpec(**(facts | changes))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float64"}, "float64"),
        ({"sinks": True}, "sinks"),
        ({"intervals": True}, "packed documents"),
        ({"keys": 2 * T}, "same positions"),
        ({"queries": 100, "keys": 100}, "multiple of 128"),
        ({"width": 40, "value_width": 40}, "head widths"),
    ],
)
def test_what_it_cannot_serve(changes, reason):
    """Each with its reason; packed documents are intervals that it can."""
    assert reason in attention_splash.unsupported(spec(**changes))
    assert attention_splash.unsupported(spec(intervals=True, documents=True)) is None


def test_elsewhere_than_on_tpu():
    """Forced, it raises and says why; auto takes another. For a TPU mesh auto takes it."""
    q, k, v, _ = (x[:1] for x in arrays())
    with pytest.raises(UserError, match="impl='splash' cannot serve .* the platform is cpu"):
        attention(q, k, v, Mask(causal=True), impl="splash")
    token = partition._platform.set("tpu")
    try:
        assert ATTENTION.pick(spec()) == "splash"
    finally:
        partition._platform.reset(token)
