"""The implementations of a mixer by which the laws are tried, forced by their names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import mixers
from attnlab.ops import dispatch
from tests.mixers import cases


def everywhere(cls):
    """Names of the implementations that run on every platform."""
    return [name for name in cls.implementations if name not in ways(cls) or ways(cls)[name].platforms is None]


def kernels(cls):
    """Names of those that can be interpreted elsewhere."""
    return [name for name, way in ways(cls).items() if way.interpretable]


def ways(cls):
    """Implementations by name; a mixer without an op names its implementations only."""
    return cls.implementations if isinstance(cls.implementations, Mapping) else {}


def default(config):
    """Its `impl` by default: `auto` or the like."""
    return next(f for f in dataclasses.fields(config) if f.name == "impl").default


def implementations(config, picked=None):
    """`auto` or the like, and by their names, forced, those that compute otherwise; kernels: see `test_kernels`.

    Args:
      config: of a mixer.
      picked: names of what its ops choose by default, where that is known.
    """
    cls, first = mixers.get(config.node_name), default(config)
    assert "definition" in cls.implementations
    by_default = dataclasses.replace(config, impl=first)
    picked = {name for *_, name in choices(by_default)} if picked is None else picked
    tried = [name for name in everywhere(cls) if name != first and _masks_fit(config, name)]

    def same(name):  # what is chosen throughout is the same by its name
        if name == "definition" or name not in picked:
            return False
        return picked == {name} or choices(dataclasses.replace(config, impl=name)) == choices(by_default)

    return [first, *(name for name in tried if not same(name))]


def _masks_fit(config, name):
    """Masks beyond intervals are served by `tiles`, which tests/ops/test_masks.py holds to the definition, alone."""
    masked = getattr(getattr(config, "core", config), "mask", None) is not None
    return name not in (("xla",) if masked else ("tiles",))


@functools.cache
def choices(config):
    """What its ops choose, in the order of tracing: op, for what, and which."""
    graphdef, params = cases.split(cases.blank(config, jnp.float32))
    with dispatch.recording() as chosen:
        jax.eval_shape(lambda params, *args: nnx.merge(graphdef, params)(*args).y, params, *cases.inputs(jnp.float32))
    return [(choice.op, choice.spec, choice.implementation) for choice in chosen.choices]
