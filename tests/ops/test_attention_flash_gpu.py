"""Our kernels in attention's table on a GPU: asked for they are the program's; untimed, auto takes them only for masks
that are more than intervals."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from attnlab.ops import Mask, attention, attention_cudnn, attention_flash, dispatch, mask_from_segments
from attnlab.ops.attention import ATTENTION, ATTENTION_WITH_LSE, attention_with_lse
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Groups
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


@tiers.often("64-kernels0-attention_with_lse")
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


def far(length):
    """Causal, and of blocks of 32 keys those an even number of blocks away: more than an interval."""
    block = np.arange(length, dtype=np.int32) // 32
    bits = packed_bits((block[:, None] - np.arange(block[-1] + 1)) % 2 == 0)[None, None]
    return Mask(causal=True, groups=Groups(block[None], bits, size=32))


def test_auto_takes_it_for_masks_beyond_intervals(hopper):
    """Nothing else that is made for GPUs serves them: forward and backward are its kernels."""
    q, k = (jax.ShapeDtypeStruct((1, 250, heads, 64), jnp.bfloat16) for heads in (H, K))

    def run(q, k, v, mask):
        out, vjp = jax.vjp(lambda *a: attention_with_lse(*a, mask), q, k, v)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    with dispatch.recording() as chosen, use_abstract_mesh(H100):
        lowered = jax.jit(functools.partial(run, mask=far(250))).trace(q, k, k).lower(lowering_platforms=("cuda",))
        text = lowered.as_text(debug_info=True)
    assert [c.implementation for c in chosen.choices] == ["flash"]
    assert set(re.findall(r"\bmasked_((?:forward|backward)\w*)", text)) == {"backward", "forward"}
    assert "mosaic_gpu" in text and "x250x250x" not in text
    assert chosen.kernel_flops({"masked_forward": 1}) == pytest.approx(2 * H * 250 * 251 / 2 * 128)


def test_masks_that_it_cannot_serve(hopper):
    """Few rows, groups in no order, lists that are too long: XLA's form by tiles; asked for, the reason."""
    assert ATTENTION.pick(spec(pattern=2)) == "flash"
    assert ATTENTION.pick(spec(pattern=2, queries=64)) == "tiles"
    for changes, reason in (
        ({"groups": "many"}, "32 groups of keys in no promised order"),
        ({"axes": 9}, "masks of at most 8 coordinates of keys, not 9"),
        ({"queries": 2**20, "keys": 2**20}, "lists of tiles of 2 masks over 1048576 x 1048576 take more than 1024 MiB"),
    ):
        assert ATTENTION.pick(spec(pattern=2, **changes)) == "tiles"
        assert reason in attention_flash.unsupported(spec(pattern=2, **changes))


def test_it_says_what_it_was_asked_for(hopper):
    """A number of queries unlike that of keys is no obstacle."""
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 64), jnp.bfloat16) for n in (3, 70))
    with dispatch.recording() as chosen:
        o = jax.eval_shape(lambda q, k: attention(q, k, k, Mask(), impl="flash"), q, k)
    assert o.shape == q.shape and [c.implementation for c in chosen.choices] == ["flash"]
