"""First values of parameters: each is a function of the seed and of its own name."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab import mixers, models
from attnlab.models import initial
from attnlab.train.state import Model

WIDTH = 8


@functools.cache
def draw(text):
    """The jitted first values of a model, whose config's tree is in `text`."""
    return jax.jit(Model.of(models.config_from_node(json.loads(text), "model")).init)


def values(seed=0, **changes):
    """First values by path of a tiny language model, and how many layers a period of it has."""
    tree = {"name": "lm", "vocab": 11, "width": WIDTH, "layers": 4, "mlp_width": 12}
    tree |= {"mixers": {"M": {"name": "softmax", "heads": 2}}, **changes}
    flat = jax.tree_util.tree_leaves_with_path(draw(json.dumps(tree))(seed))
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(v) for p, v in flat}


def layer(found, number, period, part):
    """A layer's arrays of one part (`sublayers.N`) in a stack that repeats `period` blocks, by their names in it."""
    start = f"transformer.periods.blocks.{number % period}.{part}."
    return {k.removeprefix(start): v[number // period] for k, v in found.items() if k.startswith(start)}


def test_arms_that_differ_in_a_layer_share_every_other_array():
    """Whatever a pattern repeats, layers, MLPs, embedding and head of one name and shape are bitwise the same."""
    softmax = {"name": "softmax", "heads": 2}
    plain = values()
    hybrid = values(pattern="MX", mixers={"M": softmax, "X": {"name": "gated", "heads": 2}})
    double = values(pattern="M+X", mixers={"M": softmax, "X": {"name": "gated", "heads": 2}})
    for key in ("embedding", "head.kernel"):
        for other in (hybrid, double):
            np.testing.assert_array_equal(plain[key], other[key])
    for number in range(4):
        mixer, mlp = layer(plain, number, 1, "sublayers.0"), layer(plain, number, 1, "sublayers.1")
        assert mixer and mlp
        for key, value in mlp.items():
            np.testing.assert_array_equal(value, layer(hybrid, number, 2, "sublayers.1")[key])
            np.testing.assert_array_equal(value, layer(double, number, 1, "sublayers.2")[key])
        for key, value in mixer.items():  # the gate of `gated` comes besides the others
            np.testing.assert_array_equal(value, layer(hybrid, number, 2, "sublayers.0")[key])
            np.testing.assert_array_equal(value, layer(double, number, 1, "sublayers.0")[key])


def test_every_draw_is_of_its_own():
    """Two parameters, two layers or two seeds have no draw in common, and draws are as wide as they are declared."""
    found, other = values(), values(seed=1)
    drawn = [v for k, v in found.items() if v.ndim >= 2 and "norm" not in k]
    flat = np.concatenate([v.ravel() for v in drawn])
    assert flat.size - len(np.unique(flat)) <= 3  # fp32 has few enough normal numbers for a coincidence
    assert np.intersect1d(flat, np.concatenate([v.ravel() for v in other.values() if v.ndim >= 2])).size <= 3
    kernel = found["transformer.periods.blocks.0.sublayers.1.branch.gate.kernel"]
    assert abs(kernel.std() * WIDTH**0.5 - 1) < 0.1 and abs(kernel.mean()) < 0.05


@pytest.mark.parametrize("name", mixers.names())
def test_what_depends_on_the_key_says_how_it_is_drawn(name):
    """A mixer's random first values are all declared; one that is not would depend on the order of construction."""
    for knobs in ({}, *mixers.get(name).variants):

        def not_declared(key, knobs=knobs):
            rngs = nnx.Rngs(params=key)
            state = nnx.state(mixers.build({"name": name, **knobs}, width=32, rngs=rngs), nnx.Param)
            flat = nnx.to_flat_state(state)
            return {"/".join(map(str, path)): a[...] for path, a in flat if a.get_metadata()["draw"] is None}

        traced, shapes = jax.make_jaxpr(not_declared, return_shape=True)(jax.random.key(0))
        for path, moves in zip(shapes, of_the_key(traced.jaxpr), strict=True):
            assert not moves, f"{name} {knobs}: {path} is random; use roles.drawn"


def of_the_key(jaxpr):
    """Which results of a traced function come of its first argument, by whatever operations."""
    moved = {jaxpr.invars[0]}
    for equation in jaxpr.eqns:
        if any(isinstance(x, type(jaxpr.invars[0])) and x in moved for x in equation.invars):
            moved |= set(equation.outvars)
    return [isinstance(x, type(jaxpr.invars[0])) and x in moved for x in jaxpr.outvars]


def test_what_is_drawn_is_of_the_key():
    """The test above can fail."""
    found = jax.make_jaxpr(lambda key: (jax.random.normal(key, (2,)) * 3, jax.numpy.zeros(2) + 1))(jax.random.key(0))
    assert of_the_key(found.jaxpr) == [True, False]


def test_first_values_are_those_of_one_device():
    """Drawn where each part of an array lies, they are the same as drawn on one device."""
    from attnlab.train import sharding
    from attnlab.train.config import MeshConfig

    config = models.config_from_node(
        {"name": "lm", "vocab": 16, "width": WIDTH, "layers": 2, "mixers": {"M": {"name": "softmax", "heads": 2}}}, "m"
    )
    model = Model.of(config)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 2, length=4)
    places = sharding.parameter_shardings(mesh, model.axes, model.pure_shapes)
    spread, whole = jax.jit(model.init, out_shardings=places)(3), jax.jit(model.init)(3)
    assert any(len(v.sharding.device_set) == 4 and not v.is_fully_replicated for v in jax.tree.leaves(spread))
    jax.tree.map(np.testing.assert_array_equal, spread, whole)


def test_a_module_without_a_stack():
    """A bare mixer's parameters are drawn by their paths, too."""
    build = lambda seed: mixers.build({"name": "softmax", "heads": 2}, width=WIDTH, rngs=nnx.Rngs(seed))
    key = jax.random.key(5)
    jax.tree.map(np.testing.assert_array_equal, initial.by_path(build(0), key), initial.by_path(build(1), key))
