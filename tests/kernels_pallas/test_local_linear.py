"""Local linear attention's kernels, interpreted: against the op's definition in float64, and the laws of the solver."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.ops import Mask
from attnlab.ops.local_linear import local_linear
from kernels_pallas import masks, tuning
from kernels_pallas.flash_attention.call import Call
from kernels_pallas.local_linear_attention import Blocks, local_linear_attention, most_keys, tpu
from kernels_pallas.local_linear_attention import plan as plan_lib
from tests import tiers
from tests.kernels_pallas.recurrences import bytes_of_blocks, calls
from tests.kernels_pallas.test_flash_attention import KEYS, intervals

NAMES = "q", "ridge", "k", "v"
SMALL = Blocks(128, 128, 128, 128)
PARTS = Blocks(256, 256, 128, 128)
# Length, masks of the sequences, H K, d e, dtype, tiles.
CASES = {
    "two tiles": (130, ("packed",), (2, 1), (32, 16), "float32", SMALL),
    "documents": (256, ("causal", "packed"), (2, 1), (32, 16), "float32", PARTS),
    "bfloat16": (130, ("window", "packed"), (2, 2), (48, 64), "bfloat16", SMALL),
    "any intervals": (64, ("anything", "anything"), (3, 1), (16, 32), "float32", SMALL),
    "both": (130, ("packed", "anything"), (3, 1), (16, 32), "float32", SMALL),
    "both directions": (7, (), (2, 1), (16, 24), "float32", None),
    "one position": (1, ("causal",), (1, 1), (16, 32), "float32", None),
}


def inputs(length, of_rows, heads, widths, dtype) -> tuple[list[np.ndarray], dict]:
    """q, ridge, k, v, float32 that the dtype can say, and the intervals."""
    rng = np.random.default_rng(0)
    (H, K), (d, e), B = heads, widths, max(len(of_rows), 1)
    S = KEYS if "anything" in of_rows else length
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.dtype(dtype)).astype(np.float32)
    ridge = np.float32(rng.uniform(0.3, 1, (B, length, H)))
    bounds = {}
    if of_rows:
        each = [intervals(mask, n + 1, length) for n, mask in enumerate(of_rows)]
        row = lambda x, name: np.broadcast_to(x.get(name, np.zeros((1, 1), int))[-1:], (1, length))[0]
        bounds = {name: np.stack([row(x, name) for x in each]) for name in ("starts", "ends")}
    return [normal(B, length, H, d), ridge, normal(B, S, K, d), normal(B, S, K, e)], bounds


def results(fn, arrays, bounds, dtype) -> dict[str, np.ndarray]:
    """o, and the gradients of its product with one cotangent."""
    do = np.random.default_rng(1).normal(size=(*arrays[0].shape[:3], arrays[3].shape[3]))
    wide = jnp.promote_types(dtype, jnp.float32)
    given = [x.astype(wide if name == "ridge" else jnp.dtype(dtype)) for name, x in zip(NAMES, arrays)]
    found = [np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32)) for x in program(fn)(given, bounds, do)]
    return dict(zip(("o", *(f"d{name}" for name in NAMES)), found, strict=True))


@functools.lru_cache
def program(fn):
    def run(arrays, bounds, do):
        o, vjp = jax.vjp(lambda *arrays: fn(*arrays, **bounds), *arrays)
        return o, *vjp(do.astype(o.dtype))

    return jax.jit(run)


def op(q, ridge, k, v, starts=None, ends=None, **options):
    """The op, its arguments in the kernels' order."""
    return local_linear(q, k, v, Mask(starts, ends), ridge, **options)[0]


def exact(arrays, bounds) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return results(functools.partial(op, impl="definition"), arrays, bounds, "float64")


@functools.lru_cache
def kernel(**options):
    options = {"interpret": True, "iterations": 60} | options
    return lambda *arrays, **bounds: local_linear_attention(*arrays, **bounds, **options).o


def assert_close(found, expected, tolerance):
    for name, value in expected.items():
        off = np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-3)
        assert off <= tolerance, f"{name}: {off}"


@tiers.parametrize("case", CASES, often=["both"])
def test_equals_the_definition(case):
    """Values and gradients of q, ridge, k and v, in float64: in float32 by rounding and by the tolerance, in bfloat16
    on average at most twice as far as `cg`, which multiplies in float32."""
    *shape, dtype, tiles = CASES[case]
    arrays, bounds = inputs(*shape, dtype)
    expected = exact(arrays, bounds)
    ours = results(kernel(blocks=tiles), arrays, bounds, dtype)
    if dtype == "float32":
        return assert_close(ours, expected, 1e-4)
    xla = results(functools.partial(op, impl="cg", iterations=60), arrays, bounds, dtype)
    for name, value in expected.items():
        mean = lambda x: np.sqrt(np.mean((x[name] - value) ** 2)) / np.sqrt(np.mean(value**2))
        assert mean(ours) <= 2 * mean(xla) + (2e-3 if name == "dridge" else 0), f"{name}: {mean(ours)}, {mean(xla)}"


@functools.cache
def solver(dtype: str, iterations: int):
    """What the forward gives, float64, and the arrays. Rows of the second tile see no more than one key, those of the
    third need most iterations, those of the first few."""
    (q, ridge, k, v), _ = inputs(384, ("causal",), (1, 1), (32, 32), dtype)
    t = np.arange(384)[None]
    ends = np.where((t >= 128) & (t < 256), t % 2, t + 1)
    ridge[:, :128] = 1e4
    q = np.where(ends[..., None, None] > 0, q, 0)
    call = Call("tpu", "v6e", 32**-0.5, None, True, SMALL, True, False, True)
    bounds = tuple(jnp.asarray(x) for x in masks.intervals(None, jnp.asarray(ends), 384, 384))
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    run = jax.jit(functools.partial(tpu.forward, call, plan_lib.Solver(iterations, 1e-5)))
    found = run(arrays[0], jnp.asarray(ridge.swapaxes(1, 2)), *arrays[1:], bounds)
    wide = {name: np.asarray(x.astype(jnp.float32), np.float64)[0] for name, x in found._asdict().items()}
    return wide, (q, ridge, k, v), ends


def test_a_tile_ends_with_its_last_row():
    """Rows stop at the tolerance, each at its own iteration; a tile runs as many as its slowest row and no more."""
    found, _, _ = solver("bfloat16", 100)
    of_rows, of_tiles = (found[name].reshape(3, 128) for name in ("iterations", "turns"))
    np.testing.assert_array_equal(of_tiles, np.broadcast_to(of_rows.max(1, keepdims=True), (3, 128)))
    most = of_rows.max(1)
    assert most[0] < 6 and most[1] <= 2 and 10 < most[2] < 60
    assert np.all(of_rows[1, ::2] == 0) and len(np.unique(of_rows[2])) > 2
    assert found["residual"].max() < 1e-5


def test_bfloat16_solutions_are_as_exact_as_the_tolerance():
    """Residuals of the systems formed in float64, whose products a bfloat16 pass alone would miss by 1e-3."""
    found, (q, ridge, k, _), _ = solver("bfloat16", 100)
    folded = np.asarray(jnp.asarray(q * 32**-0.5 * np.log2(np.e), jnp.bfloat16).astype(jnp.float32), np.float64)
    for t in (256, 300, 383):
        keys = k[0, : t + 1, 0].astype(np.float64)
        p = np.exp2(keys @ folded[0, t, 0])  # of logits as flash attention rounds them
        p /= p.sum()
        around, b = keys - p @ keys, q[0, t, 0] - p @ keys
        left = b - around.T @ (p * (around @ found["x"][0, :, t])) - ridge[0, t, 0] * found["x"][0, :, t]
        assert np.linalg.norm(left) < 4e-5 * np.linalg.norm(b)


def test_the_bound_and_the_residual():
    """Cut short, a solve makes all its iterations, and says what residual is left: as `cg` does."""
    found, (q, ridge, k, v), ends = solver("float32", 4)
    assert found["turns"].max() == 4 and found["iterations"][0, 383] == 4 and 1e-4 < found["residual"][0, 383] < 1
    with jax.enable_x64(True):
        cut = jax.jit(functools.partial(local_linear, iterations=4, tolerance=1e-5, impl="cg"))
        expected, facts = cut(*(x.astype(np.float64) for x in (q, k, v)), Mask(k_end=jnp.asarray(ends)), ridge)
    np.testing.assert_allclose(found["o"], expected[0], atol=1e-4)
    np.testing.assert_allclose(found["residual"][0], facts.residual_BTH[0, :, 0], rtol=1e-2, atol=1e-5)


def test_what_nothing_sees_changes_nothing():
    """NaN in keys and values that no row sees, and in rows that see none: no other bit changes; there all is 0."""
    *shape, dtype, tiles = CASES["both"]
    arrays, bounds = inputs(*shape, dtype)
    hidden = ~np.asarray(masks.visible(bounds["starts"], bounds["ends"], shape[0], KEYS)).any(1)
    blind = bounds["starts"] >= bounds["ends"]
    assert hidden.sum() > 20 and blind.sum() > 20
    poisoned = [x.copy() for x in arrays]
    for x, where in zip(poisoned, (blind, blind, hidden, hidden)):
        x[where] = np.nan
    plain, with_nan = (results(kernel(blocks=tiles), x, bounds, dtype) for x in (arrays, poisoned))
    for name, where in zip(plain, (blind, blind, blind, hidden, hidden), strict=True):
        np.testing.assert_array_equal(plain[name], with_nan[name])
        assert not np.any(plain[name][where]) and np.any(plain[name][~where])


@tiers.exhaustive
def test_no_races(capfd):
    """Simulated on two cores, which share the parallel axes: nothing is raced for, and the definition is met."""
    (q, ridge, k, v), bounds = inputs(256, ("causal",), (2, 2), (16, 16), "float32")
    arrays = q, 1e4 * ridge, k, v  # for few iterations
    cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    simulated = results(kernel(blocks=SMALL, interpret=cores, iterations=2), arrays, bounds, "float32")
    assert_close(simulated, exact(arrays, bounds), 1e-4)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_declared_bytes_are_those_of_the_blocks():
    """Within 5 %."""
    of = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    arrays = of(2, 1024, 4, 128), jnp.ones((2, 1024, 4)), of(2, 1024, 2, 128), of(2, 1024, 2, 128)
    ends = jnp.arange(1, 1025)[None]
    loss = lambda *arrays: jnp.sum(local_linear_attention(*arrays, ends=ends).o.astype(jnp.float32))
    found = calls(jax.grad(loss, (0, 1, 2, 3)), *arrays)
    assert set(found) == {"local_linear_forward", "local_linear_backward"}
    for params in found.values():
        assert params["cost_estimate"].bytes_accessed == pytest.approx(bytes_of_blocks(params), rel=0.05)


def test_tiles():
    """They fit into fast memory, fewer rows where there are more keys; what no chip holds has none."""
    for kind in tuning.KINDS.values():
        most = most_keys(kind, 128, 128, 2)
        sizes = [plan_lib.blocks(kind, 4096, keys, 128, 128, 2) for keys in (100, 4096, most, most + 1)]
        assert sizes[0].keys == 128 and sizes[1].rows > sizes[2].rows == 128 and sizes[3] is None
        for keys, blocks in ((4096, sizes[1]), (most, sizes[2])):
            assert keys <= plan_lib.most_keys(kind, blocks.rows, 128, 128, 2)
    assert plan_lib.blocks("v6e", 100, 100, 128, 128, 2).rows == 128


@pytest.mark.parametrize("change, says", [
    ({"ridge": (1, 5, 2)}, "ridge"), ({"k": (1, 9, 3, 4)}, "do not fit"), ({"starts": (5,)}, "starts"),
    ({"dtype": "float16"}, "bfloat16, or all float32"), ({"blocks": 3}, "blocks=3"),
    ({"iterations": 0}, "iterations=0"),
    ({"tolerance": 0.0}, "tolerance=0.0"), ({"k": (1, 10**6, 2, 4), "v": (1, 10**6, 2, 4)}, "allowed: "),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    rows, keys = (1, 5, 4, 4), (1, 9, 2, 4)
    shapes = {"q": rows, "ridge": rows[:3], "k": keys, "v": keys} | change
    dtype = shapes.pop("dtype", "float32")
    of = lambda name: {"starts": jnp.int32, "ridge": jnp.float32}.get(name, dtype)
    args = {n: jax.ShapeDtypeStruct(x, of(n)) for n, x in shapes.items() if isinstance(x, tuple)}
    rest = {n: x for n, x in shapes.items() if n not in args}
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(functools.partial(local_linear_attention, interpret=True, **rest), **args)
