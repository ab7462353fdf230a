"""Attention by cuDNN: what it is asked for in a program for CUDA, what it refuses, and that auto takes it on a GPU.

There is no GPU here: programs are lowered, not run, and what jax asks of the GPU is answered for an H100.
"""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from attnlab.errors import UserError
from attnlab.ops import Mask, attention, attention_cudnn, dispatch, mask_from_segments
from attnlab.ops.attention import ATTENTION, ATTENTION_WITH_LSE
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.parallel import partition

T, H, K = 384, 4, 2


@pytest.fixture
def hopper(monkeypatch):
    """A process on an H100, as far as tracing asks."""
    monkeypatch.setattr(attention_cudnn, "capability", lambda: (9, 0))
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda version: version <= "9.0")
    token = partition._platform.set("gpu")
    yield
    partition._platform.reset(token)


def spec(**changes):
    facts = dict(batch=2, queries=T, keys=T, heads=H, kv_heads=K, width=128, value_width=128, dtype="bfloat16",
                 causal=True, window=None, intervals=False, soft_cap=False, sinks=False)  # fmt: skip
    return AttentionSpec(**(facts | changes))


def calls(mask, width, dtype=jnp.bfloat16):
    """Of forward and backward, lowered for CUDA: cuDNN's calls by name, each with its settings; and the choices."""
    q, k = (jax.ShapeDtypeStruct((2, T, heads, width), dtype) for heads in (H, K))
    run = lambda q, k, v, do: (lambda o, vjp: (o, vjp(do)))(*jax.vjp(lambda *x: attention(*x, mask), q, k, v))
    with dispatch.recording() as chosen:
        text = jax.jit(run).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'custom_call @(__cudnn\$\w+)\(.*?backend_config = "((?:[^"\\]|\\.)*)"', text)
    settings = {name: json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"] for name, config in found}
    return settings, [choice.implementation for choice in chosen.choices], text


@pytest.mark.parametrize(
    "mask, width, kind, window",
    [
        (Mask(), 64, "NO_MASK", 0),
        (Mask(causal=True), 128, "CAUSAL", 0),
        (Mask(causal=True, window=37), 256, "CAUSAL", 37),
    ],
)
def test_a_program_for_cuda_calls_it(hopper, mask, width, kind, window):
    """Auto takes it, forward and backward are its calls and nothing of T x S is made; a window counts as ours does."""
    settings, chosen, text = calls(mask, width)
    assert chosen == ["cudnn"]
    assert (
        set(settings)
        == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
        == set(attention_cudnn.kernel_flops(spec()))
    )
    for found in settings.values():
        assert found["mask_type"] == kind and found["sliding_window_length"] == window
        assert found["fmha_scale"] == pytest.approx(width**-0.5)
    assert f"x{T}x{T}x" not in text and "dot_general" not in text


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"sinks": True}, "no sinks"),
        ({"soft_cap": True}, "no soft-cap"),
        ({"intervals": True, "documents": True}, "packed documents"),
        ({"intervals": True}, "no intervals"),
        ({"causal": False, "window": 5}, "windows are causal"),
        ({"queries": 96, "devices": 4}, "split over devices"),
        ({"keys": 2 * T}, "same positions"),
        ({"width": 192}, "192/128"),
        ({"width": 60, "value_width": 60}, "60 is not a multiple of 8"),
        ({"width": 264, "value_width": 264}, "at most 256"),
    ],
)
def test_what_it_cannot_serve(hopper, changes, reason):
    """Each with its reason, and auto then takes XLA's form; nothing else about the spec is refused."""
    assert attention_cudnn.unsupported(spec()) is None
    assert reason in attention_cudnn.unsupported(spec(**changes))
    assert ATTENTION.pick(spec()) == "cudnn" and ATTENTION.pick(spec(**changes)) == "xla"


def test_what_it_serves(hopper):
    """Keys of another number, devices that share unmasked queries, half precision, no groups."""
    for changes in (
        {"causal": False, "keys": 99},
        {"causal": False, "devices": 4},
        {"dtype": "float16", "kv_heads": H},
    ):
        assert attention_cudnn.unsupported(spec(**changes)) is None


def test_packed_rows_and_the_lse_are_not_its(hopper):
    """Documents, which only run time knows, and attention that returns its log-sum-exp go to XLA."""
    settings, chosen, _ = calls(mask_from_segments(jnp.ones((2, T), jnp.int32), T, causal=True), 64)
    assert not settings and chosen == ["xla"]
    assert "cudnn" not in ATTENTION_WITH_LSE.table  # jax rounds the log-sum-exp to the type of the products


def test_the_gpu_decides(hopper, monkeypatch):
    """Older ones take narrower heads or none; without one here nobody can say, so that auto does not take it."""
    for found, width, reason in (((8, 0), 192, "at most 128"), ((7, 5), 64, "needs compute capability 8.0"),
                                 (None, 64, "no NVIDIA GPU")):  # fmt: skip
        monkeypatch.setattr(attention_cudnn, "capability", lambda found=found: found)
        asked = spec(width=width, value_width=width)
        assert reason in attention_cudnn.unsupported(asked)
        assert ATTENTION.pick(asked) == "xla"


def test_elsewhere_than_on_a_gpu():
    """Forced, it raises and says why; auto takes another."""
    assert attention_cudnn.capability() is None
    q = jnp.ones((1, 8, 1, 8), jnp.bfloat16)
    with pytest.raises(UserError, match="impl='cudnn' cannot serve .* it runs on gpu; the platform is cpu"):
        attention(q, q, q, Mask(causal=True), impl="cudnn")


def test_a_backward_pass_is_not_counted_as_a_forward_one():
    """Of names that begin alike a kernel has the longer one."""
    flops = attention_cudnn.kernel_flops(spec())
    choice = dispatch.Choice("attention", spec(), "cudnn", flops)
    backward = dispatch.Record([choice]).kernel_flops({"__cudnn$fmhaSoftmaxBackward": 3, "__cudnn$convForward": 1})
    assert backward == 3 * flops["__cudnn$fmhaSoftmaxBackward"] > 0
