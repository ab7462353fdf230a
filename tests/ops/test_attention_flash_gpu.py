"""Our kernels in attention's table on a GPU: asked for they are the program's, auto never takes them untimed."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from attnlab.ops import Mask, attention, attention_cudnn, attention_flash, dispatch, mask_from_segments
from attnlab.ops.attention import ATTENTION, ATTENTION_WITH_LSE, attention_with_lse
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.parallel import partition
from tests import tiers

T, H, K = 256, 4, 2
KIND = "NVIDIA H100 80GB HBM3"
H100 = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=KIND, platform="gpu", num_cores=132))


@pytest.fixture
def hopper(monkeypatch):
    """A process on an H100, as far as tracing asks."""
    monkeypatch.setattr(attention_cudnn, "capability", lambda: (9, 0))
    tokens = [(v, v.set(x)) for v, x in ((partition._platform, "gpu"), (partition._device_kind, KIND))]
    yield
    for variable, token in tokens:
        variable.reset(token)


def spec(**changes):
    facts = dict(batch=2, queries=T, keys=T, heads=H, kv_heads=K, width=128, value_width=128, dtype="bfloat16",
                 causal=True, window=None, intervals=False, soft_cap=False, sinks=False)  # fmt: skip
    return AttentionSpec(**(facts | changes))


@tiers.parametrize("op", [attention, attention_with_lse], often=[attention_with_lse])
@pytest.mark.parametrize("width, kernels", [(64, ["backward", "forward"]), (192, ["backward_keys", "backward_rows",
                                                                                  "forward"])])  # fmt: skip
def test_asked_for_it_is_the_program(hopper, op, width, kernels):
    """Packed rows, sinks and a cap, at a length that fills no tile: forward and backward are its kernels alone."""
    q, k = (jax.ShapeDtypeStruct((2, 250, heads, width), jnp.bfloat16) for heads in (H, K))
    mask = mask_from_segments(jnp.arange(250)[None].repeat(2, 0) // 90, 250, causal=True)
    attend = lambda q, k, v, s: op(q, k, v, mask, sinks_H=s, soft_cap=9.0, impl="flash")

    def run(q, k, v, sinks):
        out, vjp = jax.vjp(attend, q, k, v, sinks)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    with dispatch.recording() as chosen, use_abstract_mesh(H100):
        lowered = jax.jit(run).trace(q, k, k, jax.ShapeDtypeStruct((H,), jnp.float32))
        text = lowered.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert set(re.findall(r"\bflash_((?:forward|backward)\w*)", text)) == set(kernels)
    assert "mosaic_gpu" in text and "x250x250x" not in text
    flops = chosen.kernel_flops({f"flash_{name}": 1 for name in kernels})
    # Of a pair and head: d + e, then 3 d + 2 e, or twice the scores and dp.
    assert flops == pytest.approx(2 * 2 * H * 250 * 251 / 2 * width * (7 if width == 64 else 13))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float32"}, "bfloat16, not float32"),
        ({"width": 320}, "at most 256"),
        ({}, "for Hopper, not NVIDIA A100"),
    ],
)
def test_what_it_cannot_serve(hopper, changes, reason):
    """Other types, wider heads, other GPUs: each with its reason."""
    assert attention_flash.unsupported(spec()) is None
    partition._device_kind.set(KIND if changes else "NVIDIA A100-SXM4-80GB")
    assert reason in attention_flash.unsupported(spec(**changes))


def test_auto_does_not_take_it(hopper):
    """cuDNN where it serves, else XLA's form, until there are figures that say otherwise."""
    assert ATTENTION.pick(spec()) == "cudnn"
    for changes in ({"sinks": True}, {"soft_cap": True}, {"intervals": True, "documents": True}):
        assert attention_flash.unsupported(spec(**changes)) is None
        assert ATTENTION.pick(spec(**changes)) == "xla" == ATTENTION_WITH_LSE.pick(spec(**changes))


def test_it_says_what_it_was_asked_for(hopper):
    """A number of queries unlike that of keys is no obstacle."""
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 64), jnp.bfloat16) for n in (3, 70))
    with dispatch.recording() as chosen:
        o = jax.eval_shape(lambda q, k: attention(q, k, k, Mask(), impl="flash"), q, k)
    assert o.shape == q.shape and [c.implementation for c in chosen.choices] == ["flash"]
