"""Local linear attention: its definition against the regression written out, its blockwise form against the definition,
and the limits in which it is something known. In float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.ops import Mask, blockwise, mask_for_extension, mask_from_segments
from attnlab.ops.local_linear import local_linear
from attnlab.parallel import partition
from tests import tiers
from tests.ops import reference

T = 45
SEGMENTS = np.array([[1] * 14 + [2] * 3 + [3] * 21 + [0] * 7, [0] * 2 + [4] * 23 + [5] * 20])
START = np.random.default_rng(2).integers(0, T, (2, T))
MASKS = {
    "intervals": lambda: Mask(START, np.where(np.arange(T) % 3 == 0, START, START + 5)),  # a third sees nothing
    "causal window": lambda: Mask(causal=True, window=7),
    "packed": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True),
    "packed both ways": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=False),
    "packed window": lambda: mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True, window=9),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a short sequence meets several blocks."""
    for name, value in {"ROWS": 16, "BODIES": 2, "LEAST_KEYS": 16, "ALIGN": 4}.items():
        monkeypatch.setattr(blockwise, name, value)


def arrays(B=2, T=T, S=None, H=4, K=2, d=5, e=3, seed=0, least=0.1):
    """q, k, v and a ridge [B, T, H] between `least` and 1."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, d), (B, S or T, K, d), (B, S or T, K, e)
    return [*(rng.normal(size=s) for s in shapes), rng.uniform(least, 1, (B, T, H))]


@functools.lru_cache
def program(options, gradients, rows, form):
    """One for all of the same shapes. rows, form: what tests patch, and is in it."""

    def run(q, k, v, ridge, mask, do):
        f = lambda *a: local_linear(*a[:3], mask, a[3], **dict(options))
        if not gradients:
            return f(q, k, v, ridge)
        o, vjp, solves = jax.vjp(f, q, k, v, ridge, has_aux=True)
        return (o, *vjp(do)), solves

    return jax.jit(run)


def solved(q, k, v, mask, ridge, *, gradients=False, **options):
    """`local_linear` by one program; with gradients of q, k, v and ridge for one cotangent behind the output."""
    do = np.random.default_rng(1).normal(size=(*q.shape[:3], v.shape[3])).astype(q.dtype)
    run = program(tuple(options.items()), gradients, blockwise.ROWS, partition.by_platform)
    return jax.tree.map(np.asarray, run(q, k, v, ridge, mask, do))


def value_and_grads(impl, q, k, v, ridge, mask, **options):
    return solved(q, k, v, mask, ridge, gradients=True, impl=impl, **options)[0]


def by_default(*args, cpu, default):
    return default(*args)


def assert_close(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def softmax_row(logits):
    w = np.exp(logits - logits.max())
    return w / w.sum()


def rows(q, k, v, ridge, scale, regression):
    """`regression(q, keys, values, weights, ridge)` for every row of causal attention, as loops."""
    q, k, v, ridge = map(np.asarray, (q, k, v, ridge))
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    out = np.zeros((B, T, H, v.shape[3]))
    for b, t, h in np.ndindex(B, T, H):
        keys, values = k[b, : t + 1, h // group], v[b, : t + 1, h // group]
        p = softmax_row(scale * keys @ q[b, t, h])
        out[b, t, h] = regression(q[b, t, h], keys, values, p, ridge[b, t, h])
    return out


def normal_equations(q, keys, values, p, ridge):
    """The intercept of the penalised least-squares problem, with (b, W) as one unknown."""
    design = np.concatenate([np.ones((len(keys), 1)), keys - q], axis=1)
    penalty = ridge * np.diag([0.0] + [1.0] * len(q))
    return np.linalg.solve(design.T @ (p[:, None] * design) + penalty, design.T @ (p[:, None] * values))[0]


def uncentred(q, keys, values, p, ridge, total=1.0):
    """The authors' algebra around the query, with weights that sum to `total` and a ridge of that share."""
    w, z = total * p, keys - q
    mu = w @ z
    rho = np.linalg.solve(z.T @ (w[:, None] * z) + ridge * total * np.eye(len(q)), mu)
    return (w * (1 - z @ rho)) @ values / (total - mu @ rho)


# The definition, against other ways to write it.


@pytest.mark.parametrize("impl", ["definition", "cg"])
def test_is_the_weighted_ridge_regression(impl):
    q, k, v, ridge = arrays(B=1, T=9)
    o, _ = solved(q, k, v, Mask(causal=True), ridge, scale=0.7, impl=impl)
    assert_close([o], [rows(q, k, v, ridge, 0.7, normal_equations)])


def test_centred_equals_uncentred():
    q, k, v, ridge = arrays(T=9)
    o, _ = solved(q, k, v, Mask(causal=True), ridge, scale=0.7)
    expected = rows(q, k, v, ridge, 0.7, lambda *a: uncentred(*a, total=3.7))
    assert_close([o], [expected])


def of_blocks(blocks):
    """The regression of a row with the second moments within blocks of channels alone."""

    def regression(q, keys, values, p, ridge):
        around = keys - p @ keys
        block = np.arange(len(q)) * blocks // len(q)
        A = np.where(block[:, None] == block, around.T @ (p[:, None] * around), 0) + ridge * np.eye(len(q))
        return (p * (1 + around @ np.linalg.solve(A, q - p @ keys))) @ values

    return regression


@tiers.often("2")
@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_blocks_keep_their_own_second_moments(blocks):
    """Written out; one block is the regression itself, as many as channels a matrix of variances."""
    q, k, v, ridge = arrays(B=1, T=9, d=6)
    expected = rows(q, k, v, ridge, 0.7, of_blocks(blocks))
    for impl in ("definition", "cg"):
        o, _ = solved(q, k, v, Mask(causal=True), ridge, scale=0.7, blocks=blocks, impl=impl)
        assert_close([o], [expected])
    assert (np.abs(expected - rows(q, k, v, ridge, 0.7, normal_equations)).max() < 1e-10) == (blocks == 1)


@tiers.exhaustive
@pytest.mark.parametrize("impl", ["cg", "cg_fixed"])
def test_gradients_with_blocks_equal_autodiff_through_cholesky(impl, small_tiles):
    q, k, v, ridge = arrays(d=6)
    mask = MASKS["packed"]()
    expected = value_and_grads("definition", q, k, v, ridge, mask, blocks=3)
    assert_close(value_and_grads(impl, q, k, v, ridge, mask, blocks=3), expected)


def test_residuals_choose_the_iterations():
    """Heads of 32 and a ridge of 0.1 in float32: 16 iterations do not reach the tolerance. With a bound of 100 every
    row does, in more than 16 and before the bound, and values and gradients come near the direct solve in float64, as
    near as the tolerance says. `cg_fixed` makes `iterations` in any case."""
    q, k, v, _ = arrays(B=1, T=40, H=1, K=1, d=32, e=4)
    ridge, mask = np.full((1, 40, 1), 0.1), Mask(causal=True)
    exact = value_and_grads("definition", q, k, v, ridge, mask)
    low = [x.astype(np.float32) for x in (q, k, v, ridge)]
    do = np.random.default_rng(1).normal(size=exact[0].shape).astype(np.float32)

    def run(*low, **options):
        f = lambda *a: local_linear(*a[:3], mask, a[3], **options)
        o, vjp, solves = jax.vjp(f, *low, has_aux=True)
        return (o, *vjp(do)), solves

    @jax.jit
    def every(*low):
        """Values and gradients, and how the systems were solved."""
        least = run(*low), run(*low, max_iterations=100), run(*low, max_iterations=100, tolerance=1e-6)
        return least, local_linear(*low[:3], mask, low[3], max_iterations=100, impl="cg_fixed")[1]

    ((few, cut), (all_, chosen), (closer, _)), fixed = jax.tree.map(np.asarray, every(*low))
    few, all_, closer = (
        max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(x, exact, strict=True)) for x in (few, all_, closer)
    )
    assert cut.residual_BTH.max() > 1e-4 and cut.iterations_BTH.max() == 16
    assert chosen.residual_BTH.max() <= 1e-5 and 16 < chosen.iterations_BTH.max() < 100
    assert 3 * closer < all_ < 3e-4 < few
    assert fixed.iterations_BTH.max() == 16


def test_centred_loses_less_to_rounding():
    """In float32, queries far from their keys: the centred form by blocks against the authors' algebra."""
    q, k, v, ridge = arrays(T=40, d=16, H=2, K=2)
    q, ridge = 4 * q, np.full_like(ridge, 0.1)
    exact = rows(q, k, v, ridge, 0.25, normal_equations)
    low = [x.astype(np.float32) for x in (q, k, v, ridge)]
    o, _ = solved(*low[:3], Mask(causal=True), low[3], scale=0.25, iterations=40)
    other = rows(*low, 0.25, uncentred)
    error = lambda y: np.abs(np.asarray(y, np.float64) - exact).max() / np.abs(exact).max()
    assert error(o) < 1e-4 and error(o) < error(other) / 3


# The blockwise form against the definition: values, and the implicit gradients against autodiff through Cholesky.


@tiers.parametrize(
    "name, K, blocks",
    [("packed", 2, 1), ("packed both ways", 1, 1), ("causal window", 4, 1), ("intervals", 2, 3)],
    often=[("intervals", 2, 3)],
)
def test_custom_vjp_equals_autodiff_through_cholesky(name, K, blocks, small_tiles):
    q, k, v, ridge = arrays(K=K, d=5 if blocks == 1 else 6)
    mask = MASKS[name]()
    expected = value_and_grads("definition", q, k, v, ridge, mask, blocks=blocks)
    assert_close(value_and_grads("cg", q, k, v, ridge, mask, blocks=blocks), expected)
    assert all(np.abs(x).max() > 1e-3 for x in expected)


def test_accelerator_form_equals_definition(small_tiles, monkeypatch):
    monkeypatch.setattr(partition, "by_platform", by_default)
    q, k, v, ridge = arrays()
    mask = MASKS["packed window"]()
    assert_close(value_and_grads("cg", q, k, v, ridge, mask), value_and_grads("definition", q, k, v, ridge, mask))


@tiers.exhaustive
def test_fixed_number_of_iterations_equals_definition(small_tiles):
    q, k, v, ridge = arrays()
    mask = MASKS["packed"]()
    assert_close(value_and_grads("cg_fixed", q, k, v, ridge, mask), value_and_grads("definition", q, k, v, ridge, mask))


def test_queries_appended_to_a_cache():
    q, k, v, ridge = arrays(T=3, S=30)
    mask = mask_for_extension(jnp.asarray([27, 20]), 3)
    assert_close(value_and_grads("cg", q, k, v, ridge, mask), value_and_grads("definition", q, k, v, ridge, mask))


@tiers.exhaustive
def test_the_gradient_of_the_ridge_is_the_finite_difference():
    q, k, v, ridge = arrays(B=1, T=8)
    mask, step = Mask(causal=True), 1e-6
    total = lambda r: jnp.sum(jnp.sin(solved(q, k, v, mask, r)[0]))
    direction = jnp.asarray(np.random.default_rng(2).normal(size=ridge.shape))
    difference = (total(ridge + step * direction) - total(ridge - step * direction)) / (2 * step)
    np.testing.assert_allclose((jax.grad(total)(ridge) * direction).sum(), difference, rtol=1e-6)


@tiers.exhaustive
def test_conjugate_gradients_of_d_iterations_are_direct():
    q, k, v, ridge = arrays(d=5)
    mask = Mask(causal=True)
    options = {"iterations": 5, "tolerance": 1e-15}
    actual = value_and_grads("cg", q, k, v, ridge, mask, **options)
    assert_close(actual, value_and_grads("definition", q, k, v, ridge, mask), 1e-8)
    _, few = solved(q, k, v, mask, ridge, iterations=2)
    _, all_ = solved(q, k, v, mask, ridge, **options)
    assert few.residual_BTH.max() > 1e-2 and all_.residual_BTH.max() < 1e-8
    # A row needs no more iterations than it has keys besides its own direction.
    assert np.all(np.asarray(all_.iterations_BTH)[:, 0] == 1) and all_.iterations_BTH.max() == 5


def test_one_turn_is_a_step_along_the_offset():
    """Capped at one turn: x = (q - m) |q - m|^2 / ((q - m) A (q - m))."""
    q, k, v, ridge = arrays(T=9)

    def step(q, keys, values, p, ridge):
        m = p @ keys
        A = (keys - m).T @ (p[:, None] * (keys - m)) + ridge * np.eye(len(q))
        x = (q - m) * ((q - m) @ (q - m)) / ((q - m) @ A @ (q - m))
        return (p * (1 + (keys - m) @ x)) @ values

    o, solves = solved(q, k, v, Mask(causal=True), ridge, scale=0.7, iterations=1)
    assert_close([o], [rows(q, k, v, ridge, 0.7, step)])
    assert solves.iterations_BTH.max() == 1


# Identities.


def test_infinite_ridge_is_softmax_attention():
    q, k, v, ridge = arrays()
    for mask in (Mask(causal=True), MASKS["packed"]()):
        o, _ = solved(q, k, v, mask, 1e13 * ridge)
        assert_close([o], reference.attention(q, k, v, mask, v[:, :, :1].repeat(4, 2))[:1], 1e-11)


def test_zero_scale_is_ridge_regression_with_an_intercept():
    q, k, v, ridge = arrays(T=9)
    o, _ = solved(q, k, v, Mask(causal=True), ridge, scale=0.0)

    def regression(q, keys, values, p, ridge):
        """Ordinary ridge regression on centred data."""
        x, y = keys - keys.mean(0), values - values.mean(0)
        W = np.linalg.solve(x.T @ x / len(x) + ridge * np.eye(len(q)), x.T @ y / len(x))
        return values.mean(0) + (q - keys.mean(0)) @ W

    assert_close([o], [rows(q, k, v, ridge, 0.0, regression)])


def test_affine_values_are_reproduced():
    """v = W k + b gives W q + b as the ridge goes to 0, where more than d keys are seen; softmax attention does not."""
    q, k, _, ridge = arrays(K=4, e=5)
    rng = np.random.default_rng(3)
    W, b = rng.normal(size=(5, 5)), rng.normal(size=5)
    mask = Mask(causal=True)
    error = lambda o: np.abs(o - (q @ W + b))[:, 12:].max()
    o, _ = solved(q, k, k @ W + b, mask, 1e-11 * ridge, iterations=60)
    assert error(o) < 1e-6
    assert error(reference.attention(q, k, k @ W + b, mask, q)[0]) > 1


def test_constant_values_are_reproduced():
    q, k, v, ridge = arrays()
    o, _ = solved(q, k, np.ones_like(v) * [1.0, -2.0, 0.5], Mask(causal=True), ridge)
    assert_close([o], [np.broadcast_to([1.0, -2.0, 0.5], o.shape)], 1e-12)


@tiers.exhaustive
@pytest.mark.parametrize("iterations", [1, 16])
def test_weights_sum_to_one_and_may_be_negative(iterations):
    """Also where the solver was cut short."""
    q, k, _, ridge = arrays(T=12)
    v = np.broadcast_to(np.eye(12)[None, :, None], (2, 12, 2, 12))  # the output row is the row of weights
    weights, _ = solved(q, k, v, Mask(causal=True), ridge, iterations=iterations)
    assert_close([weights.sum(-1)], [np.ones((2, 12, 4))], 1e-12)
    assert weights.min() < -1e-3
    assert not np.any(np.triu(np.asarray(weights).transpose(0, 2, 1, 3), 1))


@tiers.often("float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_first_output_is_the_first_value_exactly(dtype):
    q, k, v, ridge = (x.astype(dtype) for x in arrays(K=4))
    o, _ = solved(30 * q, k, v, Mask(causal=True), 0.01 * ridge)
    np.testing.assert_array_equal(o[:, 0], v[:, 0])


@tiers.exhaustive
def test_translation_of_queries_and_keys_changes_nothing():
    """Along a direction in which all keys stand alike, so that a row's logits move by one number."""
    q, k, v, ridge = arrays()
    k[..., -1] = 0.3
    move = np.asarray([0.0, 0.0, 0.0, 0.0, 5.0])
    plain, _ = solved(q, k, v, Mask(causal=True), ridge)
    moved, _ = solved(q + move, k + move, v, Mask(causal=True), ridge)
    assert_close([moved], [plain])
    # With logits held at 0, any direction.
    move = np.random.default_rng(4).normal(size=5)
    plain, moved = (solved(q + c, k + c, v, Mask(causal=True), ridge, scale=0.0)[0] for c in (0, move))
    assert_close([moved], [plain])


def test_shift_of_logits_changes_nothing():
    """A coordinate in which all keys are 1 adds a row's own number to its logits: the ridge must not see it."""
    q, k, v, ridge = arrays()
    shift = 3 * np.random.default_rng(5).normal(size=(*q.shape[:3], 1))
    longer = [np.concatenate([q, shift], -1), np.concatenate([k, np.ones_like(k[..., :1])], -1)]
    plain, _ = solved(q, k, v, Mask(causal=True), ridge, scale=0.5)
    shifted, _ = solved(*longer, v, Mask(causal=True), ridge, scale=0.5)
    assert_close([shifted], [plain])


def test_order_of_keys_does_not_matter():
    q, k, v, ridge = arrays()
    order = np.random.default_rng(6).permutation(T)
    plain, _ = solved(q, k, v, Mask(), ridge)
    mixed, _ = solved(q, k[:, order], v[:, order], Mask(), ridge)
    assert_close([mixed], [plain])


def test_common_rotation_of_queries_and_keys_changes_nothing():
    """Why RoPE is admissible with an isotropic ridge: shifting all positions is such a rotation."""
    q, k, v, ridge = arrays()
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(5, 5)))[0]
    plain, _ = solved(q, k, v, Mask(causal=True), ridge)
    turned, _ = solved(q @ turn, k @ turn, v, Mask(causal=True), ridge)
    assert_close([turned], [plain])


# Masks, memory, and what is refused.


@tiers.parametrize("impl", ["definition", "cg"], often=["cg"])
def test_rows_that_see_nothing_are_zero_with_zero_gradients(impl, small_tiles):
    q, k, v, ridge = arrays(d=6)
    every = functools.partial(solved, q, k, v, ridge=ridge, gradients=True, impl=impl, blocks=3)
    (o, dq, dk, dv, dridge), _ = every(mask=MASKS["intervals"]())
    assert not any(np.any(x[:, ::3]) for x in (o, dq, dridge))
    assert np.all(np.any(o[:, 1::3], axis=-1))
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv, dridge))
    none, solves = every(mask=Mask(START, START))
    assert not any(map(np.any, none))
    assert not np.any(solves.residual_BTH) and not np.any(solves.iterations_BTH)


def test_the_past_is_bitwise_the_same_whatever_the_future(small_tiles):
    """Also where rows that come later keep a block's solver going."""
    q, k, v, ridge = (x.astype(np.float32) for x in arrays())
    run = lambda q, k, v, ridge: solved(q, k, v, Mask(causal=True), ridge)[0]
    before = run(q, k, v, ridge)
    for t in (1, 20, T - 1):
        change = lambda x, factor: np.concatenate([x[:, :t], x[:, t:] * np.float32(factor)], 1)
        after = run(change(q, 9.0), change(k, -7.0), change(v, 3.0), change(ridge, 0.01))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t:], before[:, t:])


@pytest.mark.slow
def test_memory_grows_linearly(monkeypatch):
    monkeypatch.setattr(blockwise, "BODIES", 1)

    def scratch(length):
        q, k, v, ridge = arrays(B=1, T=length, H=1, K=1, d=8, e=8)
        f = lambda *a: jax.vjp(lambda *a: local_linear(*a[:3], Mask(causal=True), a[3])[0], *a)[1](v)
        return jax.jit(f).lower(q, k, v, ridge).compile().memory_analysis().temp_size_in_bytes

    assert scratch(8192) < 2.2 * scratch(4096)


def test_inside_shard_map():
    """Batch and heads over devices: the solver's loop starts with what varies as its results do."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    q, k, v, ridge = arrays()
    f = lambda *a: jax.vjp(lambda *a: local_linear(*a[:3], Mask(causal=True), a[3])[0], *a)[1](a[0][..., :3])
    sharded = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))
    assert_close(sharded(q, k, v, ridge), jax.jit(f)(q, k, v, ridge))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ridge": jnp.ones((3,))}, "ridge"),
        ({"iterations": 0}, "iterations=0"),
        ({"max_iterations": 3}, "max_iterations=3 .*allowed: 4 or more"),
        ({"blocks": 2}, "blocks=2 .*divisors of the width 5"),
        ({"impl": "cuda"}, "definition, cg, cg_fixed"),
        ({"k": jnp.ones((2, T, 3, 5))}, "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v, ridge = arrays()
    given = {"q": q, "k": k, "v": v, "ridge": ridge, "iterations": 4} | change
    q, k, v, ridge = (given.pop(name) for name in ("q", "k", "v", "ridge"))
    with pytest.raises(UserError, match=message):
        local_linear(q, k, v, Mask(), ridge, **given)
