"""Attention pooling of bags: the published formula, stochastic top-k masking, what a bag's order and padding change."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.errors import ConfigError
from attnlab.models.bags import BagConfig, Bags
from attnlab.models.cost import model_cost
from attnlab.models.transformer import mixer_table
from attnlab.ops.bag_pooling import likeness, pooled, some_of_the_strongest
from tests.mixers import flops
from tests.models import drawn as drawn_lib

SIZES = (9, 4, 1)  # instances of the bags; the row has room for 9
QUERIES = {"form": "queries", "pool_heads": 2, "pool_dropout": 0.0, "gate_width": 128}
SOFTMAX = {"M": {"name": "softmax", "heads": 2, "causal": False}}


def config(**fields):
    usual = {"inputs": 5, "classes": 3, "width": 8, "branches": 3, "gate_width": 6, "mask_top": 4, "dtype": "float64"}
    return BagConfig(**usual | fields)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def batch(seed=0):
    rng = np.random.default_rng(seed)
    made = {"inputs": rng.normal(size=(3, 9, 5)), "segments": np.arange(9) < np.array(SIZES)[:, None]}
    made |= {"targets": rng.integers(0, 3, (3, 1)), "weights": np.array([[1.0], [2.0], [0.5]])}
    return {name: array.astype(np.int32) if name in ("segments", "targets") else array for name, array in made.items()}


def build(c, seed=0):
    """A model whose biases are not 0."""
    return drawn_lib.module(lambda: Bags(c, rngs=nnx.Rngs(seed)), seed)


def definition(pooling, b, M):
    """Bag by bag, branch by branch, without padding; the bag's classifier reads what its mean attention pools."""
    total, softmax = 0.0, jax.nn.softmax
    nll = lambda layer, z, y: -jnp.log(softmax(layer(z))[y])
    for x, size, y, w in zip(b["inputs"], SIZES, b["targets"][:, 0], b["weights"][:, 0]):
        h = jnp.maximum(x[:size] @ pooling.features.kernel[...], 0)
        tanh, gate = jnp.tanh(pooling.tanh(h)), 1 / (1 + jnp.exp(-pooling.sigmoid(h)))
        a = softmax(pooling.logits(tanh * gate), axis=0)  # [n, M]
        loss = nll(pooling.classifier, a.mean(1) @ h, y)
        cos = lambda i, j: a[:, i] @ a[:, j] / jnp.sqrt((a[:, i] @ a[:, i]) * (a[:, j] @ a[:, j]))
        if M > 1:
            loss += sum(nll(layer, a[:, m] @ h, y) for m, layer in enumerate(pooling.classifiers)) / M
            loss += sum(cos(i, j) for i in range(M) for j in range(i)) / (M * (M - 1) / 2)
        total += w * loss
    return total


def normed(y, norm):
    y = y - y.mean()
    return y / jnp.sqrt((y * y).mean() + 1e-6) * norm.scale[...] + norm.bias[...]


def queried(pooling, b, M, H=2):
    """The form with queries, bag by bag, branch by branch, head by head."""
    total = 0.0
    nll = lambda layer, z, y: -jnp.log(jax.nn.softmax(layer(z))[y])
    of_head = lambda y, i: y[..., 4 * i : 4 * i + 4]
    read = lambda part, a, h: normed(
        part.out(jnp.concatenate([a[i] @ of_head(part.value(h), i) for i in range(H)])), part.norm
    )
    for x, size, y, w in zip(b["inputs"], SIZES, b["targets"][:, 0], b["weights"][:, 0]):
        h = jnp.maximum(x[:size] @ pooling.features.kernel[...], 0)
        a = [
            [jax.nn.softmax(of_head(m.key(h), i) @ of_head(m.query(m.token[...]), i) / 2.0) for i in range(H)]
            for m in pooling.branches
        ]
        loss = nll(pooling.classifier, read(pooling.bag, [sum(a[m][i] for m in range(M)) / M for i in range(H)], h), y)
        for m, branch in enumerate(pooling.branches):
            loss += nll(pooling.classifiers[m], read(branch.projected, a[m], h), y) / M
        cos = lambda p, q: p @ q / jnp.sqrt((p @ p) * (q @ q))
        pairs = [cos(a[m][i], a[n][i]) for i in range(H) for m in range(M) for n in range(m)]
        total += w * (loss + (sum(pairs) / len(pairs) if pairs else 0))
    return total


def hold(graphdef, params, b, definition, shared, **near):
    """The loss and its gradients are those of `definition(pooling)`. All parameters learn but the bias of `shared`: a
    number that all logits of a branch have changes no softmax, and its gradient is what rounding leaves."""
    ours = lambda p: nnx.merge(graphdef, p).loss(b, None, {}).total
    theirs = lambda p: definition(nnx.merge(graphdef, p).pooling)
    (a, da), (e, de) = jax.jit(lambda p: (jax.value_and_grad(ours)(p), jax.value_and_grad(theirs)(p)))(params)
    np.testing.assert_allclose(a, e, rtol=1e-12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **near), da, de)
    learn = {jax.tree_util.keystr(path): np.any(np.asarray(g)) for path, g in jax.tree.leaves_with_path(da)}
    assert all(moved for path, moved in learn.items() if not (shared in path and "bias" in path)), learn


@pytest.mark.parametrize("M", [1, 3])
def test_queries_equal_the_formula(x64, M):
    """The loss and its gradient, in float64, each head written out; one branch has a classifier and no diversity."""
    b = batch()
    graphdef, params = nnx.split(build(config(branches=M, **QUERIES)))
    hold(graphdef, params, b, lambda pooling: queried(pooling, b, M), "key", rtol=1e-8, atol=1e-11)
    found = jax.eval_shape(lambda p: nnx.merge(graphdef, p).loss(b, None, {}).losses, params)
    assert set(found) == {"loss", "branch_loss"} | ({"diversity_loss"} if M > 1 else set())


def test_queries_hide_and_drop_in_training_alone(x64):
    """Each head of each branch hides `floor(share k)` of a bag's instances by itself, and padding has no weight;
    dropout draws by the key alone. Queries begin near 0: then attention is even."""
    c, b = config(mask_share=0.6, **QUERIES), batch()
    graphdef, params = nnx.split(build(c))
    read = jax.jit(lambda params, key: nnx.merge(graphdef, params).read(b, key)[0])
    a = np.asarray(read(params, jax.random.key(0))[2])  # [B, H, M, N]
    present = np.broadcast_to((b["segments"] > 0)[:, None, None], a.shape)
    assert a.shape == (3, 2, 3, 9) and not a[~present].any()
    np.testing.assert_array_equal(
        ((a == 0) & present).sum(-1), np.array([2, 2, 0])[:, None, None] + np.zeros((1, 2, 3))
    )
    assert len({row.tobytes() for row in (a[0] == 0).reshape(6, 9)}) > 1
    assert (np.asarray(read(params, None)[2]) > 0)[present].all()
    dropped = dataclasses.replace(c, mask_top=0, pool_dropout=0.5)
    assert dropped.draws and not dataclasses.replace(dropped, pool_dropout=0.0).draws
    other = nnx.split(nnx.eval_shape(lambda: Bags(dropped, rngs=nnx.Rngs(0))))[0]
    loss = jax.jit(lambda key: nnx.merge(other, params).loss(b, key, {}).total)
    assert len({float(loss(key)) for key in (None, jax.random.key(0), jax.random.key(1))}) == 3
    fresh = Bags(config(branches=1, dtype="float32", **QUERIES), rngs=nnx.Rngs(0)).pooling.branches[0]
    assert 1e-7 < np.std(fresh.token[...]) < 1e-5


@pytest.mark.parametrize("M", [1, 3])
def test_equals_the_formula(x64, M):
    """The loss and its gradient, in float64; of one branch there is the bag's cross-entropy alone. Evaluation has the
    bag's."""
    model, b = build(config(branches=M)), batch()
    hold(*nnx.split(model), b, lambda pooling: definition(pooling, b, M), "logits", rtol=1e-9, atol=1e-12)
    sums, evaluated = jax.jit(lambda b: (model.loss(b, None, {}), model.evaluate(b, {})))(b)
    assert set(sums.losses) == ({"loss"} if M == 1 else {"loss", "branch_loss", "diversity_loss"})
    np.testing.assert_allclose(evaluated["nll"], [sums.losses["loss"]], rtol=1e-12)
    assert (sums.weight, sums.tokens, evaluated["tokens"]) == (3.5, sum(SIZES), 3.5)


@pytest.mark.parametrize("form", [{}, QUERIES], ids=["gated", "queries"])
def test_order_and_padding_change_nothing(x64, form):
    """Instances may come in any order; what lies behind a bag's end has attention 0 and no gradient."""
    model, b = build(config(**form)), batch()
    read = jax.jit(lambda b: model.read(b, None)[0])
    bag, branches, a = map(np.asarray, read(b))
    behind = (b["segments"] == 0).reshape(3, *(1,) * (a.ndim - 2), 9)
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-12)
    assert (a[np.broadcast_to(behind, a.shape)] == 0).all()
    order = np.array([3, 0, 2, 1, 4, 5, 6, 7, 8])
    other = np.where(b["segments"][..., None] > 0, b["inputs"], 1e3)
    moved = b | {"inputs": other[:, order], "segments": b["segments"][:, order]}
    bag_, branches_, a_ = map(np.asarray, read(moved))
    for x, y in ((bag, bag_), (branches, branches_), (a[..., order], a_)):
        np.testing.assert_allclose(x, y, rtol=1e-10)
    dx = np.asarray(jax.jit(jax.grad(lambda x: model.loss(b | {"inputs": x}, None, {}).total))(b["inputs"]))
    assert (dx[b["segments"] == 0] == 0).all() and (abs(dx).max(-1)[b["segments"] > 0] > 0).all()


def drawn(count, top, share, present, seed=0):
    logits = jnp.asarray(np.random.default_rng(seed).normal(size=(len(present), 2, present.shape[1])))
    draw = lambda key: some_of_the_strongest(logits, present, key, top, share)
    run = jax.jit(lambda: jax.vmap(draw)(jax.random.split(jax.random.key(seed), count)))
    return logits, np.asarray(run())


def test_masking_hides_a_share_of_the_strongest():
    """`floor(share k)` of the k largest logits of each bag and branch, each of them as often, branches by themselves;
    k is the bag's size where that is smaller."""
    present = jnp.arange(9) < jnp.array(SIZES)[:, None]
    logits, hidden = drawn(600, 5, 0.6, present)
    assert (hidden.sum(-1) == np.array([3, 2, 0])[:, None]).all()  # of 5, of 4, of 1
    for b, size in enumerate(SIZES):
        for m in range(2):
            k = min(size, 5)
            strongest = np.argsort(-np.asarray(logits)[b, m, :size])[:k]
            often = hidden[:, b, m].mean(0)
            assert often[strongest].sum() == pytest.approx(int(0.6 * k)) == pytest.approx(often.sum())
            share = int(0.6 * k) / k
            np.testing.assert_allclose(often[strongest], share, atol=5 * np.sqrt(share * (1 - share) / 600) + 1e-9)
    same = (np.argsort(-logits[0, 0])[:5] == np.argsort(-logits[0, 1])[:5]).all()
    assert not same and len({h.tobytes() for h in hidden[:, 0]}) > 50  # of 10 x 10 pairs of choices


def test_masking_scales_what_is_left(x64):
    """By one constant in each branch; the gradient is that of a softmax without what is hidden."""
    present = jnp.arange(9) < jnp.array(SIZES)[:, None]
    logits, hidden = drawn(1, 4, 0.6, present)
    h = jnp.asarray(np.random.default_rng(1).normal(size=(3, 9, 2)))
    everything = jnp.broadcast_to(present[:, None], logits.shape)
    kinds = (np.asarray(everything), np.asarray(everything) & ~hidden[0])
    plain, masked = map(np.asarray, jax.jit(lambda: [pooled(logits, kept, h)[1] for kept in kinds])())
    for b, m in np.ndindex(3, 2):
        left = ~hidden[0, b, m] & np.asarray(present[b])
        np.testing.assert_allclose(np.ptp(masked[b, m][left] / plain[b, m][left]), 0, atol=1e-12)
        assert (masked[b, m][~left] == 0).all()

    @jax.jit
    def slopes(logits):
        key = jax.random.split(jax.random.key(0), 1)[0]
        kept = lambda l: everything & ~some_of_the_strongest(l, present, key, 4, 0.6)
        slope = lambda kept: jax.grad(lambda l: pooled(l, kept(l), h)[0].sum())(logits)
        return slope(kept), slope(lambda l: kinds[1])

    through, fixed = map(np.asarray, slopes(logits))
    np.testing.assert_allclose(through, fixed, rtol=1e-12)
    assert (through[hidden[0]] == 0).all() and np.isfinite(through).all()


def test_training_alone_masks(x64):
    """Every key draws otherwise; without one, with k or the share 0 nothing is hidden, and the trainer gives none."""
    c, b = config(), batch()
    graphdef, params = drawn_lib.apart(lambda: Bags(c, rngs=nnx.Rngs(0)))
    loss = jax.jit(lambda key: nnx.merge(graphdef, params).loss(b, key, {}).total)
    keys = [jax.random.key(i) for i in range(3)]
    assert c.draws and len({float(loss(key)) for key in [None, *keys]}) == 4

    def draws(c, key):
        made = nnx.split(nnx.eval_shape(lambda: Bags(c, rngs=nnx.Rngs(0))))[0]
        return "random_bits" in str(jax.make_jaxpr(lambda: nnx.merge(made, params).loss(b, key, {}).total)())

    assert draws(c, keys[0]) and not draws(c, None)
    for none in ({"mask_top": 0}, {"mask_share": 0.0}, {"mask_top": 1}):
        still = dataclasses.replace(c, **none)
        assert not still.draws and not draws(still, keys[0])
    assert dataclasses.replace(config(layers=1, mixers=mixer_table(SOFTMAX, "m")), mask_top=0, dropout=0.5).draws


def test_likeness_is_the_mean_cosine_of_pairs(x64):
    """1 of equal attention, 0 of attention apart and of one branch."""
    a = np.random.default_rng(0).dirichlet(np.ones(7), size=(2, 4))
    unit = a / np.linalg.norm(a, axis=-1, keepdims=True)
    pairs = [np.einsum("bn,bn->b", unit[:, i], unit[:, j]) for i in range(4) for j in range(i)]
    given = (a, a[:, :1].repeat(3, axis=1), np.eye(4)[None], a[:, :1])
    some, equal, apart, one = jax.jit(lambda: [likeness(jnp.asarray(x)) for x in given])()
    np.testing.assert_allclose(some, np.mean(pairs, axis=0), rtol=1e-12)
    np.testing.assert_allclose(equal, 1, rtol=1e-12)
    np.testing.assert_allclose(apart, 0, atol=1e-12)
    np.testing.assert_array_equal(one, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"branches": 1},
        {"layers": 1},
        {"layers": 1, "norm": "none"},
        QUERIES,
        {"layers": 1, "branches": 1} | QUERIES,
    ],
    ids=str,
)
def test_cost_counts_the_parameters(fields):
    c = config(dtype="float32", **fields, mixers=mixer_table(SOFTMAX, "m") if "layers" in fields else {})
    model = nnx.eval_shape(lambda: Bags(c, rngs=nnx.Rngs(0)))
    assert model_cost(c, 9).parameters == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if c.layers or c.form == "gated":
        return
    graphdef, params = nnx.split(model)
    counted = flops.count(lambda p: nnx.merge(graphdef, p).read(batch(), None)[0], params)
    of_queries = 2 * c.branches * c.width**2  # once a batch
    assert counted - of_queries == pytest.approx(3 * 9 * model_cost(c, 9).total_flops, rel=1e-9)


def test_a_stack_mixes_instances_before():
    """One instance of a bag changes the features of others; the bag's end stays unseen."""
    c = config(dtype="float32", layers=1, mixers=mixer_table(SOFTMAX, "m"), mask_top=0)
    model, b = build(c), batch()
    read = jax.jit(lambda x: model.read(b | {"inputs": x}, None)[1].y)
    x = np.asarray(b["inputs"])
    at = lambda *place: x + (np.arange(x.size).reshape(x.shape) // 5 == 9 * place[0] + place[1]).astype(x.dtype)
    first, other, behind = map(np.asarray, (read(x), read(at(0, 3)), read(at(1, 7))))
    assert (abs(other - first)[0].max(-1) > 0).all() and (other[1:] == first[1:]).all()
    np.testing.assert_array_equal(behind[1, :4], first[1, :4])


REFUSED = [
    ({"branches": 0}, "model.branches = 0"), ({"mask_share": 1.0}, "model.mask_share = 1.0"),
    ({"classes": 1}, "model.classes = 1"), ({"mask_top": -1}, "model.mask_top = -1"),
    ({"width": 0}, "model.width = 0"), ({"dropout": 0.1}, "model.dropout = 0.1 .* where model.layers is 0"),
    ({"mixers": mixer_table(SOFTMAX, "m")}, "model.mixers = .* where model.layers is 0"),
    ({"layers": 1, "mixers": mixer_table({"M": {"name": "softmax", "heads": 2}}, "m")}, "model.mixers.M.causal = True"),
    (QUERIES | {"pool_heads": 3}, "model.pool_heads = 3.*divisors of model.width"),
    (QUERIES | {"gate_width": 6}, "model.gate_width = 6.*128 where form is queries"),
    ({"pool_heads": 2}, "model.pool_heads = 2.*8 where form is gated"), ({"form": "mha"}, "model.form = 'mha'"),
    (QUERIES | {"pool_dropout": 1.0}, "model.pool_dropout = 1.0"),
    ({"layers": 1}, "names the mixer 'M'"), ({"dtype": "float16"}, "model.dtype = 'float16'"),
]  # fmt: skip


@pytest.mark.parametrize("fields, message", REFUSED, ids=[message for _, message in REFUSED])
def test_impossible_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)
