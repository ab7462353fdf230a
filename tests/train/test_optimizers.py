"""Optimizers on stacked parameters, and schedules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab import config as config_lib
from attnlab.errors import ConfigError
from attnlab.train import optimizers

AXES = {"w": ("embed", "mlp"), "embedding": ("vocab", "embed"), "scale": ("embed",)}


def params():
    """A stack of three matrices, an embedding and a stack of three vectors."""
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 8, 12), "embedding": (20, 8), "scale": (3, 8)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def config(name, **fields):
    return optimizers.config_from_node(
        {"name": name, "warmup": 0, "schedule": "constant", "clip": None, **fields}, "optimizer"
    )


def updates(c, grads):
    tx = optimizers.build(c, 10, AXES)
    p = params()
    return tx.update(grads, tx.init(p), p)[0]


@pytest.mark.parametrize("name", list(optimizers.CONFIGS))
def test_decay_is_on_matrices_only(name):
    """With zero gradients only decay moves anything: every matrix by -rate * decay * w, vectors and embeddings not."""
    c = config(name, learning_rate=0.5, weight_decay=0.2)
    moved = updates(c, jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_allclose(moved["w"], -0.1 * params()["w"], rtol=1e-5)
    assert not np.any(moved["embedding"]) and not np.any(moved["scale"])


@pytest.mark.parametrize("name", list(optimizers.CONFIGS))
def test_every_optimizer_descends(name):
    """Fifty steps on a quadratic bring it down."""
    c = config(name, learning_rate=0.05, weight_decay=0.0)
    tx = optimizers.build(c, 50, AXES)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    @jax.jit
    def step(p, state):
        u, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, u), state

    p, first = params(), float(loss(params()))
    state = tx.init(p)
    for _ in range(50):
        p, state = step(p, state)
    assert float(loss(p)) < 0.7 * first


def test_muon_treats_each_layer_on_its_own():
    """A stack's update is the stack of the layers' updates, orthogonal and of the root mean square asked for."""
    grads = {k: jnp.asarray(np.random.default_rng(1).normal(size=v.shape), jnp.float32) for k, v in params().items()}
    c = config("muon", learning_rate=1.0, weight_decay=0.0)
    stacked = updates(c, grads)["w"]
    for i in range(3):
        tx = optimizers.build(c, 10, {"w": AXES["w"]})
        one = {"w": params()["w"][i]}
        alone = tx.update({"w": grads["w"][i]}, tx.init(one), one)[0]["w"]
        np.testing.assert_allclose(stacked[i], alone, atol=1e-5)
        values = np.linalg.svd(np.asarray(alone), compute_uv=False)
        assert values.max() / values.min() < 2.5


def test_muon_leaves_embeddings_to_adam():
    """What has the axis `vocab`, and vectors, get the update of Adam with Nesterov momentum."""
    grads = {k: jnp.ones_like(v) for k, v in params().items()}
    muon = updates(config("muon", learning_rate=0.1, weight_decay=0.0), grads)
    tx = optax.adamw(0.1, 0.9, 0.95, weight_decay=0.0, nesterov=True)
    adam = tx.update(grads, tx.init(params()), params())[0]
    for name in ("embedding", "scale"):
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-5)
    assert not np.allclose(muon["w"], adam["w"])


def test_clipping_is_by_global_norm():
    """Gradients above the limit act as if scaled down to it."""
    grads = jax.tree.map(lambda p: 100 * p, params())
    norm = optax.tree.norm(grads)
    lion = dict(learning_rate=1.0, weight_decay=0.0)
    clipped = optimizers.build(config("adamw", clip=1.0, **lion), 10, AXES)
    state = clipped.update(grads, clipped.init(params()), params())[1]
    np.testing.assert_allclose(state[1][0].mu["w"], 0.1 * grads["w"] / norm, rtol=1e-4)


@pytest.mark.parametrize(
    "fields, points",
    [
        ({"schedule": "constant"}, {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ({"schedule": "cosine", "final": 0.1}, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay": 0.2, "final": 0.0}, {4: 0.5, 9: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ],
)
def test_schedules(fields, points):
    """Warm-up over 10 steps of 100, then the named shape."""
    c = optimizers.config_from_node({"name": "adamw", "learning_rate": 1.0, "warmup": 10, **fields}, "optimizer")
    rate = optimizers.schedule(c, 100)
    for step, value in points.items():
        np.testing.assert_allclose(rate(step), value, atol=1e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("fields, message", [
    ({"name": "sgd"}, "optimizer.name = 'sgd'"),
    ({"learning_rate": 0.0}, "optimizer.learning_rate"),
    ({"schedule": "linear"}, "cosine, wsd, constant"),
    ({"b1": 1.0}, "optimizer.b1"),
    ({"momentum": 0.9}, "unknown key 'optimizer.momentum'"),
    ({"clip": 0.0}, "above 0, or none"),
])  # fmt: skip
def test_impossible_nodes(fields, message):
    with pytest.raises(ConfigError, match=message):
        optimizers.config_from_node({"name": "adamw", **fields}, "optimizer")


@pytest.mark.parametrize("warmup, steps, found", [
    (10, 100, 10), (99, 100, 99), (100, 100, 10), (100, 50, 5), (100, 9, 0), (0, 1, 0),
    (0.02, 1000, 20), (0.02, 10, 0), (0.999, 10, 9), (0.0, 10, 0),
])  # fmt: skip
def test_warm_up_is_a_share_or_a_number_of_steps(warmup, steps, found):
    """A share below 1 is of the steps; a number that is not below the steps is a tenth of them; the peak is reached."""
    config = optimizers.AdamWConfig(warmup=warmup, learning_rate=1.0)
    assert optimizers.warmup_steps(warmup, steps) == found
    rate = optimizers.schedule(config, steps)
    np.testing.assert_allclose([rate(s) for s in range(found)], [(s + 1) / found for s in range(found)], rtol=1e-5)
    np.testing.assert_allclose(rate(found), 1.0, rtol=1e-6)


def test_node_round_trip():
    """What config.json holds builds the same optimizer."""
    c = config("lion", b2=0.98)
    assert optimizers.config_from_node(config_lib.to_dict(c), "optimizer") == c
