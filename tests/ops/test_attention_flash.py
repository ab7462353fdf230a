"""Our kernel as an implementation of attention: when it is chosen, and split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops import Mask, attention_flash, mask_from_segments
from attnlab.ops.attention import ATTENTION, ATTENTION_WITH_LSE, attention_with_lse
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.dispatch import interpreted
from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig
from kernels_pallas import tuning
from tests import tiers
from tests.ops import reference
from tests.ops.devices import on

KINDS = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU7x": "tpu7x"}


def spec(**changes):
    facts = dict(batch=2, queries=4096, keys=4096, heads=8, kv_heads=2, width=128, value_width=128, dtype="bfloat16",
                 causal=True, window=None, intervals=False, soft_cap=False, sinks=False)  # fmt: skip
    return AttentionSpec(**(facts | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_auto_follows_the_recorded_schedules(kind, monkeypatch):
    """Where ours is recorded as shorter it is taken; where splash is, that; where nothing is, splash."""
    attention_flash.faster_than_splash.cache_clear()
    kernels = tuning.table(KINDS[kind], "schedule")["kernels"]
    total = lambda *names: sum(kernels[name]["causal_cycles"]["4096"] for name in names)
    flash = total("flash forward, causal", "flash backward, causal")
    splash = total(*(f"splash {part}, causal, tile 512" for part in ("fwd", "dq", "dkv")))
    with on(kind):
        assert ATTENTION.pick(spec()) == ("flash" if flash < splash else "splash")
        slow = {name: x | {"causal_cycles": {"4096": 1 + ("flash" in name)}} for name, x in kernels.items()}
        monkeypatch.setattr(tuning, "table", lambda kind, name: {"kernels": slow})
        attention_flash.faster_than_splash.cache_clear()
        assert ATTENTION.pick(spec()) == "splash"
    attention_flash.faster_than_splash.cache_clear()
    with on("TPU v99"):
        assert ATTENTION.pick(spec()) == "splash"


def test_auto_where_splash_cannot_serve():
    """Ours serves sinks, intervals, any length; XLA's form takes what is shorter than a tile, and float64."""
    with on("TPU v6e"):
        for changes in ({"sinks": True}, {"intervals": True}, {"queries": 1000, "keys": 1000}, {"queries": 200}):
            assert ATTENTION.pick(spec(**changes)) == "flash", changes
        for changes in ({"queries": 64, "keys": 64}, {"keys": 100}, {"dtype": "float64"}):
            assert ATTENTION.pick(spec(**changes)) == "xla", changes
        assert ATTENTION_WITH_LSE.pick(spec()) == "flash"


def test_kernel_flops():
    """Two products of the visible pairs forward, five backward; a run over a part of the keys is that part."""
    pairs = 2.0 * 2 * 8 * 4096 * 4097 / 2
    with on("TPU v6e"):
        assert attention_flash.kernel_flops(spec(value_width=64)) == {
            "flash_forward": pytest.approx(pairs * 192),
            "flash_backward": pytest.approx(pairs * (3 * 128 + 2 * 64)),
        }
        long = attention_flash.kernel_flops(spec(queries=1024, keys=1_000_000, causal=False))
    whole = 2.0 * 2 * 8 * 1024 * 1e6
    runs = whole * 256 / long["flash_forward"], whole * 640 / long["flash_backward"]
    assert all(n == pytest.approx(round(n)) for n in runs) and 1 < runs[0] < runs[1]


@tiers.parametrize("packed", [False, True], often=[True])
def test_queries_split_over_devices(packed):
    """The same where each device has a quarter of the queries, those of causal attention dealt out; lse too."""
    T = 256
    rng = np.random.default_rng(0)
    q, do = (rng.normal(size=(1, T, 2, 64)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(1, T, 1, 64)).astype(np.float32) for _ in range(2))
    segments = np.asarray([[1] * 100 + [2] * 130 + [0] * 26], np.int32)
    mask = mask_from_segments(segments, T, causal=True) if packed else Mask(causal=True)

    def run():
        (o, lse), vjp = jax.vjp(lambda q, k, v: attention_with_lse(q, k, v, mask, impl="flash"), q, k, v)
        return o, *vjp((do, do[..., 0])), jnp.maximum(lse, -100)

    devices = sharding.make_mesh(MeshConfig(data=1, context=4), 1)
    with interpreted():
        results = jax.jit(partition.traced(run, devices, sharding.ACTIVATION_RULES))()
    *expected, lse = reference.attention(q, k, v, mask, do, dlse=do[..., 0])
    for a, b in zip(results, [*expected, np.maximum(lse, -100)], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
