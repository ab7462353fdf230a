"""Modules whose parameters NumPy draws: to build one eagerly compiles a program for every shape of every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from attnlab.mixers import roles


def values(usages: Any, shapes: Any, seed: int = 0) -> Any:
    """Normal numbers of deviation 0.2, around 1 where they scale; `usages` and `shapes` are pure dicts."""
    rng = np.random.default_rng(seed)
    one = lambda usage, x: (rng.normal(size=x.shape) * 0.2 + (usage.role is roles.Role.SCALE)).astype(x.dtype)
    return jax.tree.map(one, usages, shapes)


def apart(make: Callable[[], Any], seed: int = 0) -> tuple[Any, nnx.State]:
    """`nnx.split(make(), nnx.Param)` of a module that is only traced, with `values`."""
    graphdef, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    nnx.replace_by_pure_dict(state, values(roles.usages(state), nnx.to_pure_dict(state), seed))
    return graphdef, state


def module(make: Callable[[], Any], seed: int = 0) -> Any:
    """`make()` with `values`."""
    return nnx.merge(*apart(make, seed))
