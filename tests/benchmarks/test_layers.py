"""What `benchmarks.layers` measures is one layer's forward and backward, for any mixer."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import jax
import numpy as np
import pytest

from attnlab import mixers
from attnlab.mixers import base
from benchmarks import harness, layers


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


@pytest.mark.parametrize("rows, batches", [(None, {64: 4, 256: 1}), (2, {64: 2, 256: 2})])
def test_flatness_is_per_token_of_the_rows_asked_for(rows, batches, monkeypatch):
    """Time of a batch over its tokens, in as many rows as were asked for; memory is of one row."""
    asked = []

    class Side:
        def ask(self, do, mixer, length=None):
            return {"fixed_state": mixer == "gla", "memory": {"bytes": length}}[do]

    def measure(side, programs, args):
        asked.extend(programs)
        return {(n, b, T): [harness.Timing(b * T * (1 + T / 256), None)] * 3 for n, b, T in programs}, {}, True

    monkeypatch.setattr(layers, "_measure", measure)
    args = argparse.Namespace(lengths=[64, 256], rows=rows)
    result, _, show = layers._flat(Side(), ["gla", "softmax"], args)
    assert asked == [("gla", b, T) for T, b in batches.items()]
    assert result["layers_flat"]["gla"]["seconds_per_token"] == {"64": 1.25, "256": 2.0}
    assert result["layers_flat"]["gla"]["spread"] == 1.6 and "spread" not in result["layers_flat"]["softmax"]
    show()


@pytest.mark.parametrize("given", [["--flat", "--rows", "0"], ["--rows", "7"]])
def test_rows_are_of_the_flat_measurement(given, monkeypatch):
    """One or more; elsewhere they would be ignored. Lengths that fill no batch of equal tokens name the way out."""
    monkeypatch.setattr(sys, "argv", ["layers", *given])
    with pytest.raises(SystemExit, match=f"--rows: {given[-1]}; allowed: 1 or more, with --flat"):
        layers.main()
    with pytest.raises(SystemExit, match="must divide the longest, 96.*set --rows"):
        layers._flat(None, [], argparse.Namespace(lengths=[64, 96], rows=None))


def test_what_does_not_fit_is_refused_alone():
    """The worker goes on after a mixer that is too large, and tells any other fault."""

    def of(error):
        def handler():
            raise error

        return layers.refusing(handler)

    assert of(MemoryError("Unable to allocate"))() == {"refused": "Unable to allocate"}
    full = "RESOURCE_EXHAUSTED: Out of memory allocating 28297268696 bytes."
    assert of(jax.errors.JaxRuntimeError(full + "\nmore"))() == {"refused": full}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        of(jax.errors.JaxRuntimeError("INTERNAL: a fault"))()


def test_whose_state_is_fixed():
    """Of streams with the default knobs; a mixer without a stream has none at any length."""
    assert [name for name in ("gla", "softmax", "vmoba", "rattention") if layers.fixed_state(name)] == [
        "gla",
        "rattention",
    ]
