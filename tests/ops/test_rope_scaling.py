"""The rules that stretch rotary wavelengths, channel by channel, and what they refuse."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops.rope import rope
from attnlab.ops.rope_scaling import SCALINGS, scaling_from_node


def linear(f, c, base, d):
    return f / c["factor"]


def llama3(f, c, base, d):
    """By the wavelength, in three ranges."""
    wavelength = 2 * math.pi / f
    if wavelength < c["original_length"] / c["high"]:
        return f
    if wavelength > c["original_length"] / c["low"]:
        return f / c["factor"]
    m = (c["original_length"] / wavelength - c["low"]) / (c["high"] - c["low"])
    return (1 - m) * f / c["factor"] + m * f


def yarn(f, c, base, d):
    """By the number of turns within the original length."""
    edge = lambda turns: d * math.log(c["original_length"] / (2 * math.pi * turns)) / (2 * math.log(base))
    low, high = edge(c["fast"]), edge(c["slow"])
    if c["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    i = round(-math.log(f) / math.log(base) * d / 2)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return ramp * f / c["factor"] + (1 - ramp) * f


NODES = [
    ({"name": "linear", "factor": 4.0}, linear, 1.0),
    ({"name": "llama3", "factor": 8.0, "original_length": 64, "low": 1.0, "high": 4.0}, llama3, 1.0),
    (
        {"name": "yarn", "factor": 4.0, "original_length": 256, "fast": 32.0, "slow": 1.0, "truncate": True},
        yarn,
        0.1 * math.log(4) + 1,
    ),
    (
        {"name": "yarn", "factor": 2.0, "original_length": 100, "fast": 8.0, "slow": 2.0, "truncate": False,
         "attention_factor": 1.25},
        yarn, 1.25,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("node", "rule", "factor"), NODES)
def test_rules_are_the_formulas(node, rule, factor):
    """Every frequency by itself, some of them in each range; and rope turns by them, times the factor."""
    base, d = 500.0, 16
    plain = [base ** (-2 * i / d) for i in range(d // 2)]
    wanted = np.array([rule(f, node, base, d) for f in plain])
    scaling = scaling_from_node(node, "rope_scaling")
    got, times = scaling.of(base, d)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert times == pytest.approx(factor)
    shares = wanted / plain
    assert node["name"] == "linear" or (shares.max() == 1 and np.isclose(shares.min(), 1 / node["factor"]))
    x, positions = np.random.default_rng(0).normal(size=(1, 3, 1, d)), np.array([[0, 7, 90]])
    z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * positions[..., None, None] * wanted) * factor
    turned = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), base, None, scaling)
    np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), atol=2e-5)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"name": "dynamic", "factor": 2.0}, "rope_scaling.name"),
        ({"name": "linear", "factor": 0.5}, "rope_scaling.factor = 0.5"),
        ({"name": "linear", "factor": 2.0, "low": 1.0}, "unknown key"),
        ({"name": "llama3", "factor": 2.0, "low": 4.0, "high": 4.0}, "rope_scaling.low"),
        ({"name": "yarn", "factor": 2.0, "slow": 64.0}, "rope_scaling.slow"),
        ({"name": "yarn"}, "rope_scaling.factor is missing"),
    ],
)
def test_refused(node, said):
    with pytest.raises(ConfigError, match=said):
        scaling_from_node(node, "rope_scaling")
    assert list(SCALINGS) == ["linear", "llama3", "yarn"]
