"""The identities of VMoBA (Wu et al. 2025), in float64."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.ops.share_choice import _before, _digits, _float, _sums, by_share
from tests import tiers
from tests.mixers import cases, flops
from tests.mixers.test_softmax import rotate

# What the laws are told of this mixer: tests/mixers/stated.py.
ROLES = {"matrix": "q k v out"}
NUMBERS_OF = "moba"
SPLIT_GRADIENTS = False
share = jax.jit(by_share, static_argnums=(4, 5))
FRAME = {"frame": (2, 2), "line": 3, "area": (1, 2), "volume": (1, 2, 1)}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def make(**fields):
    return cases.module(mixers.get("vmoba").Config(**fields), jnp.float64)


def block_of(config, cut, t):
    """A position's block, by the cell that it is."""
    (rows, columns), (a, b), (f, c, d) = config.frame, config.area, config.volume
    time, cell = divmod(t, rows * columns)
    y, x = divmod(cell, columns)
    return {"1d": t // config.line, "2d": (y // a, x // b), "3d": (time // f, y // c, x // d)}[cut]


def choice(config, scores, own):
    """Of one document's scores [H, n, N]: what each pool chooses, entry by entry; the margins of its choices."""
    chosen, gaps = own.copy(), [np.inf]
    for pool in pools(config.pool, scores.shape):
        s = np.array([scores[e] for e in pool])
        others = sorted((i for i, e in enumerate(pool) if not own[e]), key=lambda i: -s[i])
        if config.top_k is not None:
            n, H = scores.shape[1], scores.shape[0]
            room = config.top_k * {"row": 1, "head": n, "all": n * H}[config.pool] - sum(own[e] for e in pool)
            taken = others[: max(room, 0)]
        else:
            shared = (s - s.min()) / (s.max() - s.min() if s.max() - s.min() > 1e-6 else 1)
            rest = max(0, config.threshold * shared.sum() - sum(shared[i] for i, e in enumerate(pool) if own[e]))
            taken, reached = [], 0.0
            for i in others:
                if taken:
                    gaps.append(abs(reached - rest))
                    if reached >= rest:
                        break
                taken.append(i)
                reached += shared[i]
        for i in taken:
            chosen[pool[i]] = True
        if len(taken) < len(others):
            gaps.append(s[others[len(taken) - 1]] - s[others[len(taken)]] if taken else np.inf)
    return chosen, min(gaps)


def pools(kind, shape):
    """Entries (head, row, block) that compete."""
    entries = list(np.ndindex(*shape))
    key = {"row": lambda e: e[:2], "head": lambda e: e[0], "block": lambda e: e[2], "all": lambda e: 0}[kind]
    return [[e for e in entries if key(e) == one] for one in dict.fromkeys(map(key, entries))]


def naive(module, x, cut):
    """The layer on one document; the margin by which each choice is one."""
    c, d = module.config, module.head_dim
    linear = lambda m, y: y @ np.asarray(m.kernel[...]) + (0 if m.bias is None else np.asarray(m.bias[...]))
    q, k, v = (linear(y, x).reshape(len(x), -1, d) for y in (module.q, module.k, module.v))
    if c.rope_base is not None:
        turn = lambda y: rotate(y, np.arange(len(x)), c.rope_base, None)
        q, k = (np.stack([turn(y[:, i]) for i in range(y.shape[1])], 1) for y in (q, k))
    k, v = (np.repeat(y, c.heads // c.key_heads, axis=1) for y in (k, v))
    names = [block_of(c, cut, t) for t in range(len(x))]
    kinds = sorted(set(names))
    number = np.array([kinds.index(name) for name in names])
    means = np.stack([k[number == b].mean(0) for b in range(len(kinds))])
    scores = np.einsum("thd,bhd->htb", q, means)
    own = np.broadcast_to(number[:, None] == np.arange(len(kinds)), scores.shape)
    chosen, gap = choice(c, scores, own)
    o = np.zeros_like(q)
    for t, h in np.ndindex(*q.shape[:2]):
        seen = chosen[h, t][number]
        p = np.exp(k[seen, h] @ q[t, h] / np.sqrt(d))
        o[t, h] = p / p.sum() @ v[seen, h]
    return linear(module.out, o.reshape(len(x), -1)), gap


@tiers.often(
    "3d-{'pool': 'block', 'threshold': 0.7}",
    "1d-{'pool': 'head', 'line': 2, 'area': (1, 1)}",
    "2d-{'pool': 'all', 'threshold': 0.5, 'kv_heads': 2}",
)
@pytest.mark.parametrize(
    "cut, fields",
    [
        ("1d", {"pool": "head", "line": 2, "area": (1, 1)}),
        ("2d", {"pool": "all", "threshold": 0.5, "kv_heads": 2}),
        ("3d", {"pool": "block", "threshold": 0.7}),
        ("3d", {"pool": "row", "threshold": 0.6, "rope_base": None, "bias": "all"}),
        ("3d", {"pool": "head", "top_k": 3}),
        ("1d", {"pool": "row", "top_k": 2, "line": 2}),
    ],
    ids=str,
)
def test_layer_is_the_formula(cut, fields):
    """The whole layer written out, in packed rows."""
    module, (x, seq) = make(**{**FRAME, "cut": cut, "impl": "definition", **fields}), cases.inputs(jnp.float64)
    y = cases.output(module, x, seq)
    for row, first, end in cases.DOCUMENTS:
        want, gap = naive(module, np.asarray(x)[row, first:end], cut)
        assert gap > 1e-6
        np.testing.assert_allclose(y[row, first:end], want, atol=1e-12)


def test_cuts_by_layer():
    """1d, 2d and 3d in turn over the layers that cycle, whatever their numbers in the stack, of rows of one document;
    by itself a layer is the first, and one that does not cycle is not counted."""
    cycle, (x, _) = make(**FRAME, impl="definition"), cases.inputs(jnp.float64)
    assert make(**FRAME, cut="2d").init_shared(1, 1) == {} and "layer" not in cycle.stack_reads
    seq = mixers.Sequence.whole(*x.shape[:2])
    run = jax.jit(lambda shared: cycle(x, dataclasses.replace(seq, layer=jnp.int32(3), shared=shared)))
    shared = cycle.init_shared(*x.shape[:2])
    want = [cases.output(make(**FRAME, cut=cut, impl="definition"), x, seq) for cut in ("1d", "2d", "3d")]
    for n in range(4):
        out = run(shared)
        shared = out.shared
        np.testing.assert_allclose(out.y, want[n % 3], atol=1e-12)
    np.testing.assert_allclose(cases.output(cycle, x, seq), want[0], atol=1e-12)
    assert np.abs(want[0] - want[1]).max() > 1e-3


@tiers.often("block")
@pytest.mark.parametrize("pool", ["head", "row", "block", "all"])
def test_documents_of_long_rows_are_the_formula(pool):
    """In rows of several tiles, which are of one document, of two, and of many; one document is the row unpacked. A
    tile of 32 rows reads most where it ends one document of all blocks, here 16, and begins another."""
    runs, areas = {"cut": "1d", "line": 8}, {"cut": "2d", "frame": (4, 8), "area": (1, 2)}
    rng = np.random.default_rng(2)
    for fields, lengths in (
        (runs, [97, 53]), (runs, [1, 9, 3, 17, 2, 1, 85, 1, 8, 1, 22]), (areas, [33, *[1] * 30, 33])
    ):  # fmt: skip
        module, x = make(pool=pool, heads=2, impl="definition", **fields), rng.standard_normal((1, sum(lengths), 16))
        y = cases.output(module, x, packed_row(lengths))
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            want, gap = naive(module, x[0, end - length : end], fields["cut"])
            assert gap > 1e-9
            np.testing.assert_allclose(y[0, end - length : end], want, atol=1e-12)
    whole = cases.output(module, x, mixers.Sequence.whole(*x.shape[:2]))
    np.testing.assert_allclose(cases.output(module, x, packed_row([x.shape[1]])), whole, atol=1e-13)


def packed_row(lengths):
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]
    return mixers.Sequence(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None], segments)


@pytest.mark.parametrize("cut, extra", [("1d", 0.03), ("cycle", 0.25)])
def test_packed_rows_cost_what_whole_ones_do(cut, extra):
    """Of 1024 positions in 16 and in 256 blocks: a layer's products, but for scores of the other documents of a tile;
    and what the choice holds."""
    config, T = mixers.get("vmoba").Config(cut=cut, impl="definition"), 1024
    graphdef, params = cases.split(cases.blank(config, jnp.float32))
    x, whole = jax.ShapeDtypeStruct((1, T, cases.WIDTH), jnp.float32), mixers.Sequence.whole(1, T)

    def of(run, seq):
        return jax.make_jaxpr(lambda p, x: run(nnx.merge(graphdef, p), x, seq.derived()))(params, x).jaxpr

    alone, packed = (flops.of(of(lambda layer, *args: layer(*args).y, seq)) for seq in (whole, packed_row([T])))
    assert alone < packed < (1 + extra) * alone
    alone, packed = (sum(sizes(of(_choice, seq))) for seq in (whole, packed_row([T])))
    assert packed < 1.1 * alone


def _choice(module, x, seq):
    q, k, _ = module.positioned(x, seq)
    return module.chosen(q, k, module.places(seq), seq)


def sizes(jaxpr):
    """Of all arrays that a program makes; of loops, those of one turn."""
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from sizes(inner)


@tiers.exhaustive
def test_all_blocks_are_full_attention():
    """A share above 1, in any cut and pool; and one block that holds all."""
    x, seq = cases.inputs(jnp.float64)
    full, used = cases.module(mixers.get("softmax").Config(causal=False, impl="definition"), jnp.float64), None
    for fields in ({"cut": "3d", "pool": "head"}, {"cut": "2d", "pool": "all"}, {"cut": "1d", "line": 50}):
        module = make(**{**FRAME, "threshold": 1.01, "impl": "definition", **fields})
        for name in ("q", "k", "v", "out"):
            getattr(full, name).kernel[...] = getattr(module, name).kernel[...]
        used = np.asarray(seq.segments) > 0
        ours, theirs = cases.output(module, x, seq), cases.output(full, x, seq)
        np.testing.assert_allclose(ours[used], theirs[used], atol=1e-12)


@tiers.exhaustive
def test_a_constant_in_all_keys_changes_nothing_in_pools_of_rows():
    """It shifts all scores and logits of a row alike; where rows compete with each other it changes the choice."""
    x, seq = cases.inputs(jnp.float64)
    used, differ = np.asarray(seq.segments) > 0, {}
    for pool in ("row", "head"):
        module = make(**FRAME, cut="1d", pool=pool, threshold=0.6, rope_base=None, bias="qkv", impl="definition")
        y = cases.output(module, x, seq)
        module.k.bias[...] = module.k.bias[...] + 5 * jnp.asarray(np.random.default_rng(0).standard_normal(cases.WIDTH))
        differ[pool] = np.abs(cases.output(module, x, seq) - y)[used].max()
    assert differ["row"] < 1e-12 and differ["head"] > 1e-3


def test_what_is_chosen_reaches_the_share():
    """With the own entries, of the sum of each document of each pool, and without the last one chosen not."""
    rng = np.random.default_rng(1)
    L, M, D = 4, 30, 3
    scores, document = rng.standard_normal((L, M)), rng.integers(0, D, (L, M))
    valid = rng.random((L, M)) < 0.8
    own = valid & (rng.random((L, M)) < 0.2)
    for threshold in (0.0, 0.3, 0.8, 1.5):
        chosen = np.asarray(share(scores, own, valid, document, D, threshold))
        assert not (chosen & ~valid).any() and (chosen | ~own).all()
        for l, d in np.ndindex(L, D):
            here = valid[l] & (document[l] == d)
            shared = (scores[l] - scores[l][here].min()) / np.ptp(scores[l][here])
            total, got = shared[here].sum(), shared[here & chosen[l]].sum()
            others = here & ~own[l]
            taken = np.flatnonzero(others & chosen[l])
            assert got >= threshold * total or (chosen[l] | ~here).all()
            if len(taken) > 1:
                assert got - shared[taken].min() < threshold * total
            assert len(taken) >= 1 and (
                len(taken) == others.sum() or shared[taken].min() > shared[others & ~chosen[l]].max()
            )


def test_a_pool_of_equal_scores_is_chosen_whole():
    """Its shares are 0: none reaches any threshold but 0, at which one is taken beside the own ones."""
    own, valid = np.array([[1, 0, 0, 0, 0, 0, 0]], bool), np.array([[1, 1, 1, 1, 1, 1, 0]], bool)
    document = np.array([[0, 0, 0, 0, 1, 1, 1]])
    for threshold, many in ((0.0, 3), (0.25, 6), (1.0, 6), (1.5, 6)):
        chosen = np.asarray(share(np.full((1, 7), 0.3), own, valid, document, 2, threshold))
        assert chosen.sum() == many and not (chosen & ~valid).any(), threshold
    scores = np.random.default_rng(0).standard_normal((1, 7)).astype(np.float32)
    chosen = share(scores, own, valid, document, 2, 1.0 + 1e-12)
    np.testing.assert_array_equal(chosen, valid)


def test_a_short_document_chooses_the_same_behind_long_ones():
    """To the last bit, in float32, whatever the scores of those before it: their sums do not come in."""
    with jax.enable_x64(False):
        rng = np.random.default_rng(0)
        long, short, count = 50_000, 40, 300
        scores = rng.random((1, long + short * count), np.float32)
        document = np.concatenate([np.zeros(long, np.int32), np.repeat(np.arange(1, count + 1, dtype=np.int32), short)])
        own = rng.random(scores.shape) < 0.05
        choose = jax.jit(lambda *args, documents: by_share(*args, documents, 0.4), static_argnames="documents")
        packed = choose(scores, own, np.ones_like(own), document[None], documents=count + 1)
        rows = lambda y: y[0, long:].reshape(count, short)
        alone = choose(
            rows(scores), rows(own), np.ones((count, short), bool), np.zeros((count, short), np.int32), documents=1
        )
        np.testing.assert_array_equal(rows(np.asarray(packed)), alone)


def test_sums_are_exact():
    """As integers, of shares near 1 and of many entries, by document; the digits of a share are the share."""
    rng = np.random.default_rng(0)

    def sums(shared, document):
        digits, _ = _digits(shared)
        return digits, _before(digits, document), _sums(digits, document, 5)

    for count in (3, 5000):
        shared, document = 1 - rng.random((2, count)) / 1000, np.sort(rng.integers(0, 5, (2, count)), axis=1)
        shared[0, :2] = 0, 1
        bits = _digits(np.ones((1, count)))[1]
        digits, *summed = jax.jit(sums)(shared, document)
        exact = lambda of, bits=bits: sum(np.asarray(x).astype(object) * 2 ** (bits * i) for i, x in enumerate(of))
        number = exact(digits)
        np.testing.assert_array_equal(number, np.round(shared * 2**31).astype(np.int64))
        before, total = map(exact, summed)
        for l, t in [(l, t) for l in range(2) for t in {0, 1, 2, count // 2, count - 1}]:
            same = document[l] == document[l, t]
            assert total[l, document[l, t]] == number[l][same].sum() and before[l, t] == number[l, :t][same[:t]].sum()
        np.testing.assert_allclose(_float(digits, bits, jnp.float64), shared, atol=2.0**-32)


def test_impossible_fields():
    for fields, allowed in (
        ({"frame": (2,)}, "2 numbers"),
        ({"pool": "block", "top_k": 2}, "none where pool is block"),
        ({"threshold": 0.5, "top_k": 2}, "0.25, the default, where top_k is set"),
    ):
        with pytest.raises(ConfigError, match=allowed):
            mixers.get("vmoba").Config(**fields)
