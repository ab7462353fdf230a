"""The Hopper kernels of flash attention with no GPU: lowered, and run by jax's GPU interpreter where there is one.

The interpreter holds a thread of XLA for each warpgroup that waits, so that it needs more than a machine of two cores
gives: the suite's eight devices bring them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import hopper, masks
from kernels_pallas.flash_attention import (
    definition,
    flash_attention,
    gpu,
    gpu_backward,
    gpu_backward_rows,
    gpu_forward,
)
from tests import tiers
from tests.kernels_pallas.test_flash_attention import inputs, plain, results, typed

H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)
needs_interpreter = pytest.mark.skipif(
    hopper.missing_interpreter() is not None, reason=hopper.missing_interpreter() or ""
)
NOTHING = dict(sinks=False, gate=False, bias=None, cap=None)
EVERYTHING = dict(sinks=True, gate=True, bias="keys of heads", cap=3.0)
ROWS = dict(length=200, widths=(64, 64), heads=(1, 2, 1), dtype="bfloat16")
SMALL = gpu.Blocks(gpu_forward.Blocks(keys=64), gpu_backward.Blocks(rows=128), gpu_backward_rows.Blocks(keys=64))
TURNS = dataclasses.replace(SMALL, forward=gpu_forward.Blocks(keys=64, stages=3, pingpong=True))
# What is attended, the tiles, and whether gradients are to be the same bits in every run. Rings go round in all.
CASES = {
    "all keys, another number than rows": (ROWS | NOTHING | dict(mask="all", widths=(128, 128)), None, False),
    "packed, everything": (ROWS | EVERYTHING | dict(mask="packed", heads=(2, 4, 2)), SMALL, False),
    "any intervals, in one order": (ROWS | NOTHING | dict(mask="anything", bias="keys", sinks=True), TURNS, True),
    "window, unlike widths": (
        ROWS | EVERYTHING | dict(mask="window", widths=(192, 96), length=130, cap=None),
        None,
        False,
    ),
    "a single row": (ROWS | NOTHING | dict(mask="causal", length=1, gate=True), None, False),
}


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    """Values and gradients err at most twice as much as XLA's form of the same dtype, and nowhere far more."""
    case, blocks, deterministic = CASES[name]
    arrays, rest = inputs(case)
    with jax.enable_x64(True):
        exact = results(definition, {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}, rest)
    xla = results(plain, typed(arrays, "bfloat16"), rest)
    kernel = functools.partial(
        flash_attention, platform="cuda", interpret=True, blocks=blocks, deterministic=deterministic
    )
    ours = results(kernel, typed(arrays, "bfloat16"), rest)
    assert set(ours) == set(exact)
    for name, value in exact.items():
        finite = np.isfinite(value)
        np.testing.assert_array_equal(np.isfinite(ours[name]), finite)
        off, xla_off = (np.abs(x[name][finite] - value[finite]) for x in (ours, xla))
        slack = float(jnp.finfo(jnp.bfloat16).eps) * np.max(np.abs(value[finite]), initial=0)
        assert np.sqrt(np.mean(off**2)) <= 2 * np.sqrt(np.mean(xla_off**2)) + slack / 4, name
        assert np.max(off, initial=0) <= 3 * np.max(xla_off, initial=0) + slack, name


@needs_interpreter
@pytest.mark.parametrize(
    "widths, deterministic", [((64, 64), False), ((64, 64), True), ((192, 128), False)], ids=["fused", "split", "wide"]
)
def test_no_races(widths, deterministic):
    """Nothing is read or written that barriers do not put in order, in rings that go round and tiles of every kind."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    case = ROWS | dict(mask="window", length=256, widths=widths, sinks=True, gate=True, bias="keys", cap=None)
    arrays, rest = inputs(case)
    options = dict(interpret=_races(), deterministic=deterministic, blocks=SMALL if widths == (64, 64) else None)
    results(functools.partial(flash_attention, platform="cuda", **options), typed(arrays, "bfloat16"), rest)
    assert not gpu_callbacks.get_races().races_found


@needs_interpreter
def test_a_race_is_found(monkeypatch):
    """What the test above would see: a bias read from memory that a copy may overwrite, with no fence between."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    unfenced = lambda self, t, slot: plgpu.barrier_arrive(t.k_free.at[slot])
    monkeypatch.setattr(gpu_forward._Forward, "release_keys", unfenced)
    run = lambda q: flash_attention(
        q, q, q, key_bias=jnp.zeros((1, 256)), platform="cuda", interpret=_races(), blocks=SMALL
    )
    try:
        jax.jit(run)(jnp.ones((1, 256, 1, 64), jnp.bfloat16))[0].block_until_ready()
        found = gpu_callbacks.get_races().races_found
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops there
        found = "RACE DETECTED" in str(error)
    assert found


def _races():
    return plgpu.InterpretGPUParams(detect_races=True)


@tiers.parametrize(
    "widths, features, kernels",
    LOWERED := [
        ((64, 64), dict(sinks=True, gate=True, bias=True, soft_cap=30.0), ["flash_backward", "flash_forward"]),
        ((96, 128), dict(deterministic=True), ["flash_backward_keys", "flash_backward_rows", "flash_forward"]),
        ((192, 128), dict(gate=True), ["flash_backward_keys", "flash_backward_rows", "flash_forward"]),
    ],
    often=LOWERED[:1],
    ids=["everything", "deterministic", "wide"],
)
def test_lowers_for_a_gpu(widths, features, kernels):
    """In this jax, under jit, a scan and rematerialisation: Mosaic's calls, and shared memory that an H100 has."""
    (d, e), T = widths, 300
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    arrays = {"q": of(1, T, 4, d), "k": of(1, T, 2, d), "v": of(1, T, 2, e)}
    if features.get("sinks"):
        arrays["sinks"] = of(4, dtype=jnp.float32)
    if features.get("gate"):
        arrays["gate"] = of(1, T, 4, e)
    if features.get("bias"):
        arrays["key_bias"] = of(1, 2, T, dtype=jnp.float32)
    static = {name: features[name] for name in ("soft_cap", "deterministic") if name in features}

    def loss(arrays):
        @jax.checkpoint
        def layer(q, _):
            o, lse = flash_attention(**arrays | {"q": q}, ends=jnp.arange(1, T + 1)[None], platform="cuda", **static)
            return q + 0 * o.sum() + lse.sum().astype(q.dtype), None

        return jax.lax.scan(layer, arrays["q"], None, length=2)[0].astype(jnp.float32).sum()

    with use_abstract_mesh(H100):
        lowered = jax.jit(jax.grad(loss)).trace(arrays).lower(lowering_platforms=("cuda",))
    text = lowered.as_text(debug_info=True)
    assert "mosaic_gpu" in text
    assert sorted(set(re.findall(r"\bflash_(?:forward|backward)\w*", text))) == kernels


def test_tiles_of_every_mask():
    """The tiles that blocks of rows, and of keys, go through hold every visible pair; full ones nothing hidden."""
    rng, T, S = np.random.default_rng(0), 512, 384
    starts, ends = np.sort(rng.integers(0, S + 1, (2, 3, T)), 0)
    starts[1], ends[1] = 0, np.minimum(np.arange(T) + 1, S)
    starts[2, 100:300] = ends[2, 100:300]
    bounds = masks.intervals(jnp.asarray(starts), jnp.asarray(ends), T, S)
    seen = np.asarray(masks.visible(*bounds, T, S))
    some = seen.any(-1)
    rows, keys = 64, 64
    found = np.asarray(jax.jit(lambda bounds: gpu_forward.ranges(bounds, rows, keys))(bounds))
    for b, block, wg in np.ndindex(3, T // 128, 2):
        first, end, full, full_end = *found[b, block, :2], *found[b, block, 2 + 2 * wg : 4 + 2 * wg]
        own = slice((2 * block + wg) * rows, (2 * block + wg + 1) * rows)
        tile = seen[b, own][some[b, own]]
        assert first < end and first <= full <= full_end <= end
        assert not tile[:, : first * keys].any() and not tile[:, end * keys :].any()
        assert tile[:, full * keys : full_end * keys].all()
    causal = found[1]
    assert (causal[:, 3] - causal[:, 2]).sum() > 4  # most tiles of a causal mask are full
    blocks = gpu_backward.Blocks(64, 128)
    found = np.asarray(jax.jit(lambda bounds: gpu_backward.row_ranges(bounds, blocks, S))(bounds))
    for b, block in np.ndindex(3, S // 128):
        first, end, full, full_end = found[b, block]
        tile = seen[b, :, block * 128 : (block + 1) * 128]
        assert not tile[: first * 64].any() and not tile[end * 64 :].any()
        whole = slice(full * 64, full_end * 64)
        assert first <= full <= full_end <= end and tile[whole][some[b, whole]].all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dtype=jnp.float32), "float32; allowed: bfloat16"),
        (dict(width=264), "264 and 264; allowed: up to 256"),
        (dict(scale=0.0), "scale=0.0; allowed: a number > 0"),
        (dict(blocks="large"), "blocks=large; allowed: None or"),
    ],
)
def test_what_the_kernels_cannot_do(changes, message):
    """Said before anything is compiled, with what is allowed."""
    q = jax.ShapeDtypeStruct((1, 8, 1, changes.pop("width", 64)), changes.pop("dtype", jnp.bfloat16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q: flash_attention(q, q, q, platform="cuda", **changes), q)


@pytest.mark.skipif(hopper.missing_interpreter() is None, reason="this jax has an interpreter of GPU kernels")
def test_without_an_interpreter():
    """jax 0.10 has none to be used: asked for, it is said."""
    q = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="jax 0.11 has one"):
        flash_attention(q, q, q, platform="cuda", interpret=True)
