"""What `benchmarks.layers` measures is one layer's forward and backward, for any mixer."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import base
from benchmarks import layers


def test_the_program_is_forward_and_backward():
    """Its value and gradients are those of the layer, for x and every parameter."""
    compiled, (params, x, upstream) = layers.compile_layer("softmax", 2, 16)
    value, (to_params, to_x) = compiled(params, x, upstream)
    assert value.shape == () and to_x.shape == x.shape == (2, 16, layers.WIDTH)
    assert jax.tree.map(np.shape, to_params) == jax.tree.map(np.shape, params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves((to_params, to_x)))
    step = 1e-2 * np.sign(np.asarray(to_x))
    moved = compiled(params, x + step, upstream)[0]
    assert float(moved - value) == pytest.approx(1e-2 * float(np.abs(to_x).sum()), rel=0.1)


def test_a_mixer_without_heads(monkeypatch):
    """The defaults stand where there is no knob `heads`."""

    @dataclasses.dataclass(frozen=True)
    class Config(base.MixerConfig):
        taps: int = base.knob(3, "taps", other=(2,))

    class Headless(base.Mixer):
        pass

    Headless.Config = Config
    monkeypatch.setitem(base.MIXERS.classes, "headless", Headless)
    assert layers.default_config("headless") == Config()
    assert layers.default_config("softmax") == mixers.get("softmax").Config(heads=layers.HEADS)


def test_growth():
    """Powers of the length between neighbours."""
    assert layers._growth({1024: 10, 2048: 20, 8192: 320}) == pytest.approx([1, 2])
    assert layers._power({1024: 10, 2048: 20, 8192: 320}) == pytest.approx(1.714286)
    assert layers._power({T: 3e-9 * T**1.5 for T in (1024, 4096, 32768)}) == pytest.approx(1.5)
