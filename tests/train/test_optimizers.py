"""Optimizers on stacked parameters, and schedules."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab import config as config_lib
from attnlab.errors import ConfigError
from attnlab.mixers.roles import Fused, Role, Usage
from attnlab.models.lm import LanguageModelConfig
from attnlab.models.transformer import mixer_table
from attnlab.train import optimizers, sharding
from attnlab.train.config import MeshConfig
from attnlab.train.state import Model
from tests import tiers

USAGES = {"w": Usage(Role.MATRIX), "embedding": Usage(Role.EMBEDDING), "scale": Usage(Role.SCALE)}
# Three heads; neither the parts nor the heads end where two devices would cut the axis.
FUSED = Fused((("q", 6), ("k", 3), ("gate", 1)), groups=3)


def params():
    """A stack of three matrices, an embedding and a stack of three vectors."""
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 8, 12), "embedding": (20, 8), "scale": (3, 8)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def config(name, **fields):
    return optimizers.config_from_node(
        {"name": name, "warmup": 0, "schedule": "constant", "clip": None, **fields}, "optimizer"
    )


def updates(c, grads):
    return once(optimizers.build(c, 10, USAGES), grads, params())[0]


def once(tx, grads, weights):
    """The first update and the state after it, in one program."""
    return jax.device_get(jax.jit(lambda grads, weights: tx.update(grads, tx.init(weights), weights))(grads, weights))


@pytest.mark.parametrize("name", list(optimizers.CONFIGS))
def test_decay_is_on_matrices_only(name):
    """With zero gradients only decay moves anything: matrices by -rate * decay * w, other roles of that shape not."""
    usages = {role.value: Usage(role) for role in Role if role is not Role.AVERAGE} | {
        "fused": Usage(Role.MATRIX, Fused((("a", 4), ("b", 8))))
    }
    weights = dict.fromkeys(usages, params()["w"])
    tx = optimizers.build(config(name, learning_rate=0.5, weight_decay=0.2), 10, usages)
    moved = once(tx, jax.tree.map(np.zeros_like, weights), weights)[0]
    for role in ("matrix", "fused"):
        np.testing.assert_allclose(moved.pop(role), -0.1 * weights[role], rtol=1e-5, err_msg=role)
    assert moved and {role for role, update in moved.items() if np.any(update)} == set()


@pytest.mark.parametrize("name", list(optimizers.CONFIGS))
def test_every_optimizer_descends(name):
    """Fifty steps on a quadratic bring it down."""
    c = config(name, learning_rate=0.05, weight_decay=0.0)
    tx = optimizers.build(c, 50, USAGES)
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
    grads = {k: np.random.default_rng(1).normal(size=v.shape).astype(np.float32) for k, v in params().items()}
    c = config("muon", learning_rate=1.0, weight_decay=0.0)
    stacked = updates(c, grads)["w"]
    for i in range(3):
        tx = optimizers.build(c, 10, {"w": USAGES["w"]})
        one = {"w": params()["w"][i]}
        alone = once(tx, {"w": grads["w"][i]}, one)[0]["w"]
        np.testing.assert_allclose(stacked[i], alone, atol=1e-5)
        values = np.linalg.svd(np.asarray(alone), compute_uv=False)
        assert values.max() / values.min() < 2.5


def steps(tx, weights, grads, placed=None):
    """Updates and states of several steps, the weights kept; `placed` has the shardings of both."""
    run, state, found = jax.jit(tx.update, out_shardings=placed), jax.jit(tx.init)(weights), []
    for g in grads:
        update, state = run(g, state, weights)
        found.append((update, state))
    return found


def some(shape, seed, count=3):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


def test_muon_is_that_of_optax():
    """Without fused kernels updates and states, by their paths, are those of `optax.contrib.muon`, step by step."""
    c = config("muon", learning_rate=0.3, weight_decay=0.1)
    matrix = {"w": True, "embedding": False, "scale": False}
    stacked = optax.contrib.MuonDimensionNumbers(-2, -1)
    theirs = optax.contrib.muon(
        optimizers.schedule(c, 10), weight_decay=0.1, weight_decay_mask=matrix, adam_b1=0.9, adam_b2=0.95,
        muon_weight_dimension_numbers={k: stacked if m else None for k, m in matrix.items()}, consistent_rms=0.2,
    )  # fmt: skip
    grads = [dict(zip(params(), each)) for each in zip(*(some(v.shape, i) for i, v in enumerate(params().values())))]
    expected = steps(theirs, params(), grads)
    ours = steps(optimizers.build(c, 10, USAGES), params(), grads)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def fused_steps(mesh=None):
    """Three steps of Muon on a stack of two fused kernels [8, 30]."""
    c = config("muon", learning_rate=1.0, weight_decay=0.1)
    tx = optimizers.build(c, 10, {"qkg": Usage(Role.MATRIX, FUSED)})
    weights, *grads = trees = [{"qkg": x} for x in some((2, 8, FUSED.width), 3, 4)]
    if mesh is None:
        return steps(tx, weights, grads)
    split = sharding.parameter_shardings(mesh, {"qkg": ("embed", "heads")}, weights)
    weights, *grads = jax.device_put(trees, [split] * len(trees))
    return steps(tx, weights, grads, (split, sharding.optimizer_shardings(mesh, tx, weights, split)))


def test_muon_orthogonalises_the_parts_of_a_fused_kernel():
    """Each part as if it were a parameter of its own, a narrow one too; the state is whole, under the kernel's path."""
    found = fused_steps()
    weights, *grads = some((2, 8, FUSED.width), 3, 4)
    column = np.arange(FUSED.width) % 10
    columns = {"q": column < 6, "k": (column >= 6) & (column < 9), "gate": column == 9}
    apart = lambda x: {name: x[..., chosen] for name, chosen in columns.items()}
    c = config("muon", learning_rate=1.0, weight_decay=0.1)
    tx = optimizers.build(c, 10, dict.fromkeys(columns, Usage(Role.MATRIX)))
    expected = steps(tx, apart(weights), [apart(g) for g in grads])
    for (update, state), (alone, _) in zip(found, expected):
        for name, part in apart(update["qkg"]).items():
            np.testing.assert_allclose(part, alone[name], atol=2e-5, err_msg=name)
        held = jax.tree_util.tree_leaves_with_path(state)
        assert [x.shape for path, x in held if path[-1:] == (jax.tree_util.DictKey("qkg"),)] == [weights.shape]
    for name, part in apart(found[-1][0]["qkg"] + 0.1 * weights).items():
        values = np.linalg.svd(np.asarray(part), compute_uv=False) / (0.2 * max(part.shape[-2:]) ** 0.5)
        assert values.min() > 0.5 and values.max() < 1.3, name


def test_muon_on_split_kernels_is_that_of_one_device():
    """Sharded over rows and, where no part ends, over columns, the updates are the same."""
    split = fused_steps(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8))
    for (update, state), (expected, _) in zip(split, fused_steps(), strict=True):
        for x in (update["qkg"], state.inner_states["muon"].inner_state[0].mu["qkg"]):
            assert x.sharding.shard_shape(x.shape) == (2, 4, 15)
        np.testing.assert_allclose(update["qkg"], expected["qkg"], atol=2e-5)


MODELS = {  # between them, every role and every layout of a fused kernel
    "images": {"A": {"name": "agent", "agents": 4}, "G": {"name": "gated_deltanet"}, "H": {"name": "moh"}},
    "memory": {"M": {"name": "titans", "variant": "mac", "window": 4, "chunk": 2, "persistent": 2}},
}


@tiers.often("muon-memory")
@pytest.mark.parametrize("mixers", MODELS)
@tiers.parametrize("name", optimizers.CONFIGS, often=["muon"])
def test_whole_models(name, mixers):
    """Without gradients exactly matrices move; with them Muon's updates of matrices are orthogonal, part by part."""
    table = MODELS[mixers]
    model = Model.of(
        LanguageModelConfig(
            vocab=20, width=16, layers=2 * len(table), mixers=mixer_table(table, "mixers"), pattern="".join(table)
        )
    )
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), model.pure_shapes)
    weights, grads = draw(), draw()
    c = config(name, learning_rate=0.5, weight_decay=0.2)
    if name == "muon":  # small singular values need as many turns
        c = dataclasses.replace(c, iterations=12)
    tx = optimizers.build(c, 10, model.usages)
    both = lambda grads: {name: tx.update(g, tx.init(weights), weights)[0] for name, g in grads.items()}
    asked = {"moved": jax.tree.map(np.zeros_like, weights)} | ({"all": grads} if name == "muon" else {})
    found = jax.device_get(jax.jit(both)(asked))
    moved = found["moved"]
    usages = jax.tree_util.tree_leaves_with_path(model.usages)
    for (path, usage), update in zip(usages, jax.tree.leaves(moved), strict=True):
        assert np.any(update) == (usage.role is Role.MATRIX), path
    if name != "muon":
        return
    update = jax.tree.map(lambda u, m: (u - m) / 0.5, found["all"], moved)
    for (path, usage), x in zip(usages, jax.tree.leaves(update), strict=True):
        parts = usage.fused.split(x) if usage.fused else [x]
        for part in parts if usage.role is Role.MATRIX else ():
            values = np.linalg.svd(np.asarray(part), compute_uv=False) / (0.2 * max(part.shape[-2:]) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.3, (path, values)


def test_muon_leaves_what_is_no_matrix_to_adam():
    """Parameters of other roles get the update of Adam with Nesterov momentum."""
    grads = {k: np.ones_like(v) for k, v in params().items()}
    muon = updates(config("muon", learning_rate=0.1, weight_decay=0.0), grads)
    tx = optax.adamw(0.1, 0.9, 0.95, weight_decay=0.0, nesterov=True)
    adam = once(tx, grads, params())[0]
    for name in ("embedding", "scale"):
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-5)
    assert not np.allclose(muon["w"], adam["w"])


def test_clipping_is_by_global_norm():
    """Gradients above the limit act as if scaled down to it."""
    grads = jax.tree.map(lambda p: 100 * p, params())
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    lion = dict(learning_rate=1.0, weight_decay=0.0)
    clipped = optimizers.build(config("adamw", clip=1.0, **lion), 10, USAGES)
    state = once(clipped, grads, params())[1]
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


def with_rates(name, rates, grads, **fields):
    """Updates of two steps, and the last state, of an optimizer with `rates` and without."""
    found = []
    for given in (rates, ()):
        tx = optimizers.build(config(name, rates=given, **fields), 10, USAGES)
        state, p, moved = tx.init(params()), params(), []
        for _ in range(2):
            # Compiled as one, two programs may round otherwise.
            update, state = (tx.update if name == "adamw" else jax.jit(tx.update))(grads, state, p)
            p = optax.apply_updates(p, update)
            moved.append(update)
        found.append((moved, state))
    return found


@pytest.mark.parametrize("name", list(optimizers.CONFIGS))
def test_a_frozen_part_and_a_rate_of_its_own(name):
    """Frozen: no update, no decay, no state. Factor 0.5: the first update is half of what it would be."""
    grads = {k: np.random.default_rng(4).normal(size=v.shape).astype(np.float32) for k, v in params().items()}
    (ours, state), (plain, whole) = with_rates(name, ("*=0.5", "emb*=0", "sc?le=1"), grads, weight_decay=0.3)
    np.testing.assert_allclose(ours[0]["w"], 0.5 * plain[0]["w"], rtol=0 if name == "adamw" else 1e-6)
    for update, other in zip(ours, plain):
        np.testing.assert_array_equal(update["embedding"], jnp.zeros((20, 8)))
        np.testing.assert_allclose(update["scale"], other["scale"], rtol=1e-5)
    held = lambda s: {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(s)}
    assert held(state) == {path: shape for path, shape in held(whole).items() if "embedding" not in path}


def test_what_is_frozen_is_in_no_norm():
    """Gradients of the others are clipped as if it were not there."""
    grads = {k: np.full_like(v, 1e4 if k == "embedding" else 1e-3) for k, v in params().items()}
    (ours, state), _ = with_rates("adamw", ("embedding=0",), grads, clip=1.0)
    np.testing.assert_allclose(state[1][0].mu["scale"], 1e-3 * (0.1 + 0.9 * 0.1), rtol=1e-5)


@pytest.mark.parametrize("name", list(optimizers.CONFIGS))
def test_moving_averages_are_beside_the_optimizer(name):
    """They move to what their gradient says, in no state and no norm, and stay where they are frozen."""
    grads = {k: np.full_like(v, 1e4 if k == "embedding" else 1e-3) for k, v in params().items()}
    usages = USAGES | {"embedding": Usage(Role.AVERAGE, keep=0.9)}
    c = dict(weight_decay=0.0, clip=1e-4)
    update, state = once(optimizers.build(config(name, **c), 10, usages), grads, params())
    np.testing.assert_allclose(update["embedding"], 0.1 * (1e4 - params()["embedding"]), rtol=1e-6)
    alone = {k: grads[k] for k in ("scale", "w")}
    tx = optimizers.build(config(name, **c), 10, {k: USAGES[k] for k in alone})
    other, state_alone = once(tx, alone, {k: params()[k] for k in alone})
    for key in alone:
        np.testing.assert_allclose(update[key], other[key], rtol=1e-6)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(state_alone))
    frozen, _ = once(optimizers.build(config(name, rates=("emb*=0",), **c), 10, usages), grads, params())
    assert not np.any(frozen["embedding"])


@pytest.mark.parametrize("rates, message", [
    (("embeding=0",), "'embeding' matches no parameter .did you mean 'embedding'.*; allowed: .*scale"),
    (("*=0",), "at least one parameter that is not frozen"),
])  # fmt: skip
def test_patterns_that_match_nothing(rates, message):
    with pytest.raises(ConfigError, match=message):
        optimizers.build(config("adamw", rates=rates), 10, USAGES)


@pytest.mark.parametrize("given", ["embedding", "=0", "w=-1", "w=nan", "w=1e99", "w="])
def test_impossible_rates(given):
    with pytest.raises(ConfigError, match="optimizer.rates = .*allowed: PATTERN=FACTOR"):
        config("adamw", rates=(given,))
