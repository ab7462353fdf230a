"""Parallax's kernels, interpreted: against their definition in float64, the laws of masks, and no race."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import masks, tuning
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.parallax_attention import definition, parallax_attention
from kernels_pallas.tuning import BackwardBlocks, Blocks, ForwardBlocks
from tests import tiers
from tests.kernels_pallas.test_flash_attention import KEYS, intervals

NAMES = "q", "probe", "k", "v"
ROWS_IN_PARTS = Blocks(ForwardBlocks(256, 128, 128, 128, False), BackwardBlocks(256, 128, 128, 128))
KEYS_IN_PARTS = Blocks(ForwardBlocks(128, 256, 128, 128), BackwardBlocks(128, 256, 128, 128))
SMALLEST = Blocks(ForwardBlocks(128, 128, 128, 128), BackwardBlocks(128, 128, 128, 128))
# Mask, length, B H K, d e, dtype, tiles, and whether keys come by blocks. Of the first the last key tile of a row tile
# is seen by the second half of its rows alone.
CASES = {
    "halved": ("causal", 400, (1, 2, 1), (64, 40), "float32", ROWS_IN_PARTS, False),
    "window": ("window", 130, (1, 2, 2), (48, 48), "float32", KEYS_IN_PARTS, False),
    "documents": ("packed", 256, (2, 3, 3), (64, 64), "bfloat16", SMALLEST, True),
    "any intervals": ("anything", 64, (2, 6, 3), (192, 128), "float32", SMALLEST, True),
    "both directions": ("all", 7, (3, 2, 1), (128, 128), "bfloat16", None, False),
    "one position": ("causal", 1, (1, 3, 1), (16, 32), "bfloat16", None, False),
}


def inputs(mask, length, heads, widths, dtype) -> tuple[list[np.ndarray], dict]:
    """What is differentiated, float32 that the dtype can say, and the intervals."""
    rng = np.random.default_rng(0)
    (B, H, K), (d, e) = heads, widths
    S = KEYS if mask in ("all", "anything") else length
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.dtype(dtype)).astype(np.float32)
    arrays = [2 * normal(B, length, H, d), normal(B, length, H, d), normal(B, S, K, d), normal(B, S, K, e)]
    return arrays, intervals(mask, B, length)


@functools.lru_cache
def program(fn):
    def run(arrays, bounds, do):
        o, vjp = jax.vjp(lambda *arrays: fn(*arrays, **bounds), *arrays)
        return o, *vjp(do.astype(o.dtype))

    return jax.jit(run)


def results(fn, arrays, bounds, dtype) -> dict[str, np.ndarray]:
    """o, and the gradients of its product with one cotangent."""
    do = np.random.default_rng(1).normal(size=(*arrays[0].shape[:3], arrays[3].shape[3]))
    found = program(fn)([x.astype(jnp.dtype(dtype)) for x in arrays], bounds, do)
    found = [np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32)) for x in found]
    return dict(zip(("o", *(f"d{name}" for name in NAMES)), found, strict=True))


@functools.lru_cache
def kernel(tiles, by_blocks=False):
    """by_blocks: whether fast memory is patched to hold one tile of keys at a time."""
    return functools.partial(parallax_attention, interpret=True, blocks=tiles)


def documents(monkeypatch):
    """Arrays, bounds and results of one of the cases, for laws whose programs are the same."""
    *shape, dtype, tiles, _ = CASES["documents"]
    monkeypatch.setattr(tuning, "resident_keys", lambda kind, each, keys, tile, rest: tile)
    arrays, bounds = inputs(*shape, dtype)
    return arrays, bounds, lambda *arrays: results(kernel(tiles, True), arrays, bounds, dtype)


def exact(arrays, bounds) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return results(definition, arrays, bounds, "float64")


def plain(q, probe, k, v, *, starts=None, ends=None):
    """The form that one would write for XLA in the dtype of q: products of it, all else in float32."""
    (T, H, d), (S, K) = q.shape[1:], k.shape[1:3]
    of = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
    seen = masks.visible(starts, ends, T, S)[:, None]
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, of("bthd,bshd->bhts", q, k) * d**-0.5, -1e30), -1), 0)
    tilts = of("bthd,bshd->bhts", probe, k)
    weights = p * (1 - (tilts - (p * tilts).sum(-1, keepdims=True)))
    return of("bhts,bshe->bthe", weights.astype(q.dtype), v).astype(q.dtype)


@tiers.parametrize("case", CASES, often=["halved", "documents"])
def test_equals_the_definition(case, monkeypatch):
    """Values and gradients: of float32 by rounding, of bfloat16 at most twice as far as XLA's form of it."""
    *shape, dtype, tiles, by_blocks = CASES[case]
    if by_blocks:  # fast memory for one tile of keys at a time
        monkeypatch.setattr(tuning, "resident_keys", lambda kind, each, keys, tile, rest: tile)
    arrays, bounds = inputs(*shape, dtype)
    expected = exact(arrays, bounds)
    ours = results(kernel(tiles, by_blocks), arrays, bounds, dtype)
    xla = results(plain, arrays, bounds, dtype) if dtype == "bfloat16" else expected
    eps = float(jnp.finfo(dtype).eps)
    for name, value in expected.items():
        off, xla_off = (np.abs(x[name] - value) for x in (ours, xla))
        slack = (eps / 4 if dtype == "bfloat16" else 16 * eps) * np.max(np.abs(value))
        mean = lambda x: np.sqrt(np.mean(x**2))
        assert mean(off) <= 2 * mean(xla_off) + slack, f"{name}: {mean(off)}, XLA {mean(xla_off)}"
        assert off.max() <= 3 * xla_off.max() + 4 * slack, f"{name}: {off.max()}, XLA {xla_off.max()}"


@tiers.exhaustive
def test_no_probe_is_flash_attention():
    """The same output and gradients of q, k and v."""
    (q, _, k, v), bounds = inputs("causal", 130, (1, 2, 1), (32, 32), "float32")
    flash = lambda q, _, k, v, **bounds: flash_attention(q, k, v, **bounds, interpret=True, blocks=SMALLEST)[0]
    ours, theirs = (results(fn, [q, 0 * q, k, v], bounds, "float32") for fn in (kernel(SMALLEST), flash))
    for name in ("o", "dq", "dk", "dv"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_what_nothing_sees_changes_nothing(monkeypatch):
    """NaN in keys and values that no row sees, and in rows that see none: no other bit changes; there all is 0."""
    arrays, bounds, run = documents(monkeypatch)
    T = arrays[0].shape[1]
    hidden = ~np.asarray(masks.visible(bounds["starts"], bounds["ends"], T, T)).any(1)
    blind = bounds["starts"] >= bounds["ends"]
    assert hidden.sum() > 30 and blind.sum() > 30
    poisoned = [x.copy() for x in arrays]
    for x, where in zip(poisoned, (blind, blind, hidden, hidden)):
        x[where] = np.nan
    before, after = run(*arrays), run(*poisoned)
    for name, where in zip(before, (blind, blind, blind, hidden, hidden), strict=True):
        np.testing.assert_array_equal(before[name], after[name])
        assert not np.any(after[name][where]) and np.any(after[name][~where])


def test_what_keys_have_in_common_does_not_round_off(monkeypatch):
    """A channel of keys that is 0, or 64: the same function, and in bfloat16 as near to it."""
    (q, probe, k, v), bounds, run = documents(monkeypatch)
    q, k, far = q.copy(), k.copy(), k.copy()
    q[..., 0], k[..., 0], far[..., 0] = 0, 0, 64
    true = exact([q, probe, k, v], bounds)["o"]
    off = lambda k: np.sqrt(np.mean(np.square(run(q, probe, k, v)["o"] - true)))
    assert off(far) <= 1.5 * off(k)


def test_causality(monkeypatch):
    """Changing what comes after a position changes no bit up to it."""
    (*arrays, k, v), _, run = documents(monkeypatch)
    later = [x.copy() for x in (k, v)]
    for x in later:
        x[:, 65:] *= -3
    a, b = run(*arrays, k, v)["o"], run(*arrays, *later)["o"]
    np.testing.assert_array_equal(a[:, :65], b[:, :65])
    assert np.any(a[:, 65:] != b[:, 65:])


@tiers.exhaustive
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_no_races(mask, capfd):
    """Simulated on two cores, which share the parallel axes: nothing is raced for, and results are the same."""
    arrays, bounds = inputs(mask, 256, (1, 2, 1), (64, 64), "float32")
    tiles = ROWS_IN_PARTS if mask == "causal" else SMALLEST
    of = lambda interpret: functools.partial(parallax_attention, interpret=interpret, blocks=tiles)
    simulated = results(of(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)), arrays, bounds, "float32")
    expected = exact(arrays, bounds)
    for name, x in simulated.items():
        np.testing.assert_allclose(x, expected[name], atol=2e-5 * np.abs(expected[name]).max())
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("change, says", [
    ({"probe": (1, 5, 4, 3)}, "probe"), ({"probe": (1, 5, 2, 4)}, "probe"), ({"k": (1, 9, 3, 4)}, "do not fit"),
    ({"starts": (5,)}, "starts"), ({"dtype": "float16"}, "bfloat16, or all float32"), ({"blocks": 3}, "blocks=3"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    rows, keys = (1, 5, 4, 4), (1, 9, 2, 4)
    shapes = {"q": rows, "probe": rows, "k": keys, "v": keys} | change
    dtype = shapes.pop("dtype", "float32")
    of = lambda name: jnp.int32 if name == "starts" else dtype
    args = {n: jnp.zeros(x, of(n)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        parallax_attention(**args, interpret=True)
