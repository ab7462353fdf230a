"""Attention of the wanted (query, head) pairs against attention of all, in float64, values and gradients."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from attnlab.errors import UserError
from attnlab.ops import (
    Mask,
    attention,
    dispatch,
    gathered_kernel,
    gathered_rows,
    gathered_xla,
    mask_from_segments,
    router,
)
from attnlab.ops.gathered_attention import GATHERED_ATTENTION, chosen_attention, gathered_attention
from attnlab.ops.gathered_rows import GatheredSpec, Heads
from attnlab.parallel import partition
from kernels_pallas import masks, routed_attention
from tests import tiers
from tests.mixers import flops
from tests.ops import devices, reference

KIND = "NVIDIA H100 80GB HBM3"
H100 = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=KIND, platform="gpu", num_cores=132))
T = 45
SEGMENTS = np.array([[1] * 14 + [2] * 3 + [3] * 21 + [0] * 7, [0] * 2 + [4] * 27 + [5] * 16])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_segments(monkeypatch):
    """Segments so short that there are several, and one that is not whole."""
    monkeypatch.setattr(gathered_xla, "_SEGMENT", 16)


@pytest.fixture(params=["cpu", "accelerator"])
def form(request, monkeypatch):
    if request.param == "accelerator":
        monkeypatch.setattr(partition, "by_platform", by_default)


def by_default(*args, cpu, default):
    return default(*args)


def cpu_form(monkeypatch):
    monkeypatch.setattr(partition, "by_platform", lambda *args, cpu, default: cpu(*args))


CASES = {
    "all heads": (4, 4, (0, 1, 2, 3), 2, {"causal": True}, {}),
    "groups": (8, 2, (1, 3, 4, 5, 6, 7), 3, {"causal": True}, {"soft_cap": 2.0}),
    "window and sinks": (4, 4, (1, 3), 1, {"causal": True, "window": 9}, {"sinks": True}),
    "both ways": (4, 2, (2, 3), 1, {"causal": False}, {}),
}


def arrays(H, K, dtype=jnp.float64, d=4):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, T, n, d)).astype(dtype) for n in (H, K, K, H)]


def wanted(E, active, skewed=False):
    """The routing; skewed: all tokens of a row want the same heads."""
    scores = np.random.default_rng(1).standard_normal((2, 1 if skewed else T, E))
    best = scores >= np.sort(scores)[..., -active:][..., :1]
    return np.broadcast_to(best, (2, T, E)) & (SEGMENTS > 0)[..., None]


def both(case, skewed):
    """Value and gradients of gathered attention, and of the formula with the unwanted pairs set to 0."""
    H, K, chosen, active, mask_fields, options = CASES[case]
    q, k, v, do = arrays(H, K)
    sinks = np.linspace(-1.0, 1.0, H) if options.get("sinks") else None
    options = {key: value for key, value in options.items() if key != "sinks"}
    mask = mask_from_segments(jnp.asarray(SEGMENTS), T, **mask_fields)
    want = wanted(len(chosen), active, skewed)
    on = np.ones((2, T, H, 1), bool)
    on[:, :, np.asarray(chosen), 0] = want

    run = program(chosen, active, tuple(options.items()), gathered_xla._SEGMENT, partition.by_platform)
    o, *gradients = reference.attention(q, k, v, mask, on * do, sinks=sinks, **options)
    return run(q, k, v, sinks, mask, want, do), [on * o, *gradients]


@functools.lru_cache
def program(chosen, active, options, segment, form):
    """segment, form: what tests patch, and is in it."""

    @jax.jit
    def run(q, k, v, sinks, mask, want, do):
        fields = {"chosen": chosen, "active": active, **dict(options)}
        gathered = lambda q, k, v, sinks: gathered_attention(q, k, v, mask, want, sinks_H=sinks, **fields)
        o, back = jax.vjp(gathered, q, k, v, sinks)
        return jax.tree.leaves((o, back(do)))

    return run


@tiers.often("cpu-groups")
@tiers.parametrize("case", CASES, often=["groups"])
def test_equals_definition(case, x64, small_segments, form):
    for a, b in zip(*both(case, skewed=False), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
def test_nothing_overflows(x64, small_segments):
    """Every token of a row wanting the same heads is as exact as balanced heads."""
    for a, b in zip(*both("groups", skewed=True), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_table_holds_every_wanted_pair_once(seed):
    """Rows of a block are of its key head, ascending in position, and of its segment."""
    rng = np.random.default_rng(seed)
    chosen, group = (0, 1, 3, 4, 5), (0, 0, 1, 2, 2)
    heads = Heads(chosen, group, (0, 1, 2), 6, 2)
    plan = gathered_xla._Plan(Mask(causal=True), 1.0, None, heads, 2, 600, 600)
    scores = rng.standard_normal((1, 600, 5)) + 3 * rng.standard_normal(5)
    want = scores >= np.sort(scores)[..., -2:-1]
    table = jax.tree.map(np.asarray, jax.jit(lambda w: gathered_rows.make_table(heads, w, plan.segments()))(want))
    pairs = table.pair_Br[0]
    t, e = np.nonzero(want[0])
    np.testing.assert_array_equal(np.sort(pairs[pairs >= 0]), np.sort(t * 6 + np.asarray(chosen)[e]))
    np.testing.assert_array_equal(pairs[table.row_BTE[0, t, e]], t * 6 + np.asarray(chosen)[e])
    row = block = 0
    for s in plan.segments():
        first, L, R = s.first, s.L, s.R
        for n in range(s.N):
            for _ in range(s.I):
                held = pairs[row : row + R]
                held = held[held >= 0]
                assert np.all((held // 6 >= first + n * L) & (held // 6 < first + (n + 1) * L))
                assert np.all(np.diff(held) > 0)
                assert np.all((held % 6) // 2 == heads.key_heads[table.group_Bi[0, block]])
                row, block = row + R, block + 1
    assert row == len(pairs)


@tiers.parametrize("length", [1024, 2048, 4096], often=[1024])
@pytest.mark.parametrize("chosen, active", [((0, 1, 2, 4, 5, 6), 2), (tuple(range(8)), 4)])
def test_half_the_heads_cost_at_most_0_6(length, chosen, active, monkeypatch):
    """Products of the traced programs, causal, 4 of 8 heads on: gathered against dense, which leaves out hidden tiles
    too. No branch, no loop of unknown length: what is counted is what runs."""
    cpu_form(monkeypatch)
    x = jnp.zeros((1, length, 8, 16))
    want = jnp.zeros((1, length, len(chosen)), bool)

    def gathered(q, k, v):
        return gathered_attention(q, k, v, Mask(causal=True), want, chosen=chosen, active=active)

    def gradients(f):
        return lambda q, k, v: jax.vjp(f, q, k, v)[1](q)

    dense = lambda q, k, v: attention(q, k, v, Mask(causal=True))
    assert flops.count(gathered, x, x, x) <= 0.6 * flops.count(dense, x, x, x)
    assert flops.count(gradients(gathered), x, x, x) <= 0.6 * flops.count(gradients(dense), x, x, x)


@tiers.often("accelerator-bfloat16")
@tiers.parametrize("dtype", [jnp.bfloat16, jnp.float32], often=[jnp.bfloat16])
def test_low_precision(dtype, small_segments, form):
    """fp32 statistics in low precision, the dtype of q kept."""
    q, k, v, _ = arrays(4, 4, jnp.float32)
    want = wanted(4, 2)
    run = lambda *x: gathered_attention(*x, Mask(causal=True), want, chosen=(0, 1, 2, 3), active=2)
    low = jax.jit(run)(*(x.astype(dtype) for x in (q, k, v)))
    exact = want[..., None] * reference.attention(q, k, v, Mask(causal=True), q)[0]
    assert low.dtype == dtype
    np.testing.assert_allclose(np.asarray(low, np.float32), exact, atol=1e-5 if dtype == jnp.float32 else 0.05)


def test_the_kernel_works_as_many_tiles_as_heads_are_on(monkeypatch):
    """Key tiles that the kernel's row tiles meet, causal, 1, 2 and 4 of 4 heads on."""
    length = 4096

    def tiles(q, k, v, starts, ends, tile_heads, **options):
        rows = q.shape[1] // tile_heads.shape[1]
        first, _, _, end = jnp.moveaxis(masks.tile_ranges(starts, ends, rows, 256), -1, 0)
        met = jnp.float32(rows * jnp.sum(end - first))
        return jnp.broadcast_to(met, (*q.shape[:2], v.shape[3])), jnp.zeros(q.shape[:2])

    monkeypatch.setattr(routed_attention, "routed_attention", tiles)
    x = jnp.zeros((1, length, 4, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def met(active):
        want = router.top_k_mask(jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 4))), active)
        options = {"chosen": (0, 1, 2, 3), "active": active, "scale": 1.0, "soft_cap": None}
        return jnp.max(gathered_kernel.attention_by_xla(x, x, x, Mask(causal=True), want, **options))

    assert met(1) <= 0.4 * met(4) and met(2) <= 0.63 * met(4)


def test_rows_that_do_not_fit_are_moved_by_xla(monkeypatch):
    """Which is chosen, not done in silence; who asks for the kernels that move them is told how many fit."""
    monkeypatch.setattr(routed_attention, "most_elements", lambda *of: 8191)
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    heads = Heads((0, 1, 2, 3), (0, 0, 1, 1), (0, 1), 4, 2)
    spec = GatheredSpec(1, 4096, 4096, heads, 2, 64, 64, "float32", True, None, False, False)
    assert GATHERED_ATTENTION.pick(spec) == "routed_xla"
    assert GATHERED_ATTENTION.pick(dataclasses.replace(spec, queries=4095)) == "routed"
    with pytest.raises(UserError, match=r"8192 queries.* at most 8191"):
        GATHERED_ATTENTION.pick(spec, "routed")


def test_on_hopper_the_kernel_is_the_program():
    """Auto takes it, with rows moved by XLA: both directions are its kernels, and their products are those of wanted
    pairs. What it cannot serve is said."""
    spec = GatheredSpec(2, 256, 256, Heads.of((1, 2, 3), 4, 2), 2, 64, 64, "bfloat16", True, None, False, True)
    x = [jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    sinks, want = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((2, 256, 3), bool)

    def run(q, k, v, sinks, want):
        attend = functools.partial(chosen_attention, chosen=(1, 2, 3), active=2)
        out, vjp = jax.vjp(lambda q, k, v, s: attend(q, k, v, Mask(causal=True), want, sinks_H=s), q, k, v, sinks)
        return out, vjp(out)

    with devices.on(KIND, "gpu"), dispatch.recording() as chosen, use_abstract_mesh(H100):
        text = jax.jit(run).trace(*x, sinks, want).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
        refused = {"float32": {"dtype": "float32"}, "widths are at most 256": {"width": 264}}
        for reason, change in refused.items():
            other = dataclasses.replace(spec, **change)
            assert GATHERED_ATTENTION.pick(other) == "xla"
            assert reason in GATHERED_ATTENTION.table["routed_xla"].unsupported(other)
        assert "the platform is gpu" in GATHERED_ATTENTION.table["routed"].unsupported(spec)
    assert chosen.choices[0].spec == spec and chosen.choices[0].implementation == "routed_xla"
    assert set(re.findall(r"\brouted_((?:forward|backward)\w*)", text)) == {"forward", "backward"}
    pairs = 2 * 2 * 2 * 256 * 257 / 2  # two FLOPs, batch, heads on, pairs
    assert chosen.kernel_flops({"routed_forward": 1, "routed_backward": 1}) == pytest.approx(pairs * 64 * 7)
    with devices.on("NVIDIA A100-SXM4-80GB", "gpu"):
        assert GATHERED_ATTENTION.pick(spec) == "xla"


@tiers.exhaustive
def test_what_nobody_wants_is_not_felt_by_the_kernel():
    """NaN in queries of padding, and in its keys and values: outputs and gradients keep their bits."""
    q, k, v, do = arrays(2, 2, jnp.float32, d=16)
    mask = mask_from_segments(jnp.asarray(SEGMENTS), T, causal=True)
    want, padding = wanted(2, 1), (SEGMENTS == 0)[..., None, None]
    options = {"chosen": (0, 1), "active": 1, "scale": 1.0, "soft_cap": None, "interpret": True}

    @jax.jit
    def run(q, k, v):
        o, back = jax.vjp(lambda q, k, v: gathered_kernel.attention(q, k, v, mask, want, **options), q, k, v)
        return o, back(do)

    poisoned = [np.where(padding, np.float32("nan"), x) for x in (q, k, v)]
    jax.tree.map(np.testing.assert_array_equal, run(q, k, v), run(*poisoned))
