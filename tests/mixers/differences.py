"""Holds gradients to differences of values: a program of values alone costs a third of one with gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import mixers
from tests.mixers import cases

STEP = 3e-4  # of whose fourth power, and of float64's last digits by it, a difference is wrong


def hold(
    gradients: Any,
    graphdef: Any,
    params: Any,
    x: jax.Array,
    seq: mixers.Sequence,
    weights: Any,
    tolerance: float = 1e-10,
) -> None:
    """Gradients of the weighted sum over visible positions of what a layer gives, for its parameters and x, are what
    its values change by along a random line: one on which all parameters move, and one on which x does."""
    weights = np.asarray(weights) * (np.asarray(seq.segments) > 0)[..., None]
    leaves, treedef = jax.tree.flatten((params, x))
    values, slopes = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (leaves, gradients))
    assert len(values) == len(slopes)
    rng = np.random.default_rng(9)
    for moving in (range(len(values) - 1), [len(values) - 1]):
        line = [rng.standard_normal(a.shape) if i in moving else np.zeros(a.shape) for i, a in enumerate(values)]
        length = np.sqrt(sum(np.sum(a**2) for a in line))
        line = [a / length for a in line]

        def at(steps: int) -> float:
            there = [jnp.asarray(a + steps * STEP * way) for a, way in zip(values, line, strict=True)]
            return np.sum(weights * np.asarray(cases.call(graphdef, *jax.tree.unflatten(treedef, there), seq)))

        found = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
        expected = sum(np.sum(slope * way) for slope, way in zip(slopes, line, strict=True))
        assert abs(found - expected) < tolerance * max(1.0, *(np.abs(slopes[i]).max(initial=0) for i in moving))
