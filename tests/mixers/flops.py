"""Counts the matrix-product FLOPs of a jaxpr."""

from __future__ import annotations

import math
from typing import Any

import jax

from attnlab import masks, mixers
from tests.mixers import cases, stated


def count(fn: Any, *args: Any) -> float:
    """FLOPs of all dot_generals of `fn(*args)`, a multiply-add counted as 2, loop bodies as often as they run."""
    return of(jax.make_jaxpr(fn)(*args).jaxpr)


def of(jaxpr: Any) -> float:
    """Those of a jaxpr."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            contracted = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * contracted
            continue
        if eqn.primitive.name == "while":
            raise ValueError("a while loop has no static number of turns")
        if eqn.primitive.name == "cond":  # one branch runs: the dearest
            total += max(of(branch.jaxpr) for branch in eqn.params["branches"])
            continue
        if eqn.params.get("name") == "_resize":  # tables of an image's positions, once for all rows
            continue
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * of(inner)
    return total


def keys_seen(config, t):
    """Keys that a query at position t of one document sees."""
    config = getattr(config, "core", config)
    if its := stated.of(config.node_name, "keys_seen"):
        return its(config, t)
    if getattr(config, "mask", None) is not None:
        seq = mixers.Sequence.whole(1, cases.LENGTH)
        mask = masks.build(config.mask).mask(seq, causal=config.causal)
        return int(mask.visible(cases.LENGTH, cases.LENGTH)[0, 0, t].sum())
    if not config.causal:
        return cases.LENGTH
    return min(t + 1, getattr(config, "window", None) or cases.LENGTH)


def keys_computed(config):
    """Of all rows, what a program computes that masks instead of skipping."""
    config = getattr(config, "core", config)
    return stated.of(config.node_name, "keys_computed", lambda config: cases.LENGTH)(config)
