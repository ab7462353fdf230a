"""The linear recurrence's TPU kernels, interpreted: values and all gradients against the definition in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.ops.feature_maps import Taylor
from attnlab.ops.linear_recurrence import LINEAR_RECURRENCE
from kernels_pallas import tuning
from kernels_pallas.linear_recurrence import Features, Sizes, default_sizes, kernel_flops, linear_recurrence
from kernels_pallas.linear_recurrence import plan as plan_lib
from tests import tiers
from tests.kernels_pallas.recurrences import (
    B,
    assert_causal,
    assert_close,
    bytes_of_blocks,
    calls,
    documents_of,
    results,
    rounded,
    starts_of,
)


def inputs(length, heads, d, e, decay, state, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    arrays = {"q": normal(B, length, heads, d), "k": normal(B, length, heads, d), "u": normal(B, length, heads, e)}
    if decay == "constant":
        arrays["log_decay"] = np.float32(-np.geomspace(0.01, 1.5, heads))
    if decay == "data":
        arrays["log_decay"] = np.float32(-rng.exponential(0.2, (B, length, heads)))
    if decay == "channels":  # some keep nothing
        arrays["log_decay"] = np.float32(-rng.exponential(0.2, (B, length, heads, d)))
        arrays["log_decay"][rng.random((B, length, heads, d)) < 0.02] = -np.inf
    if state:
        arrays["state"] = normal(B, heads, d, e)
    return arrays


def definition(q, k, u, log_decay=None, state=None, documents=None, features=None):
    run = LINEAR_RECURRENCE.table["definition"].run
    return run(q, k, u, log_decay, documents, state, chunk=1, features=features)


def exact(arrays, documents, features=None):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
        return results(definition, arrays, documents=documents, features=features)


# T, H, d, e, decay, documents, state, dtype, sizes; several blocks of several chunks where sizes are given.
CASES = [
    (1, 3, 16, 16, "data", False, True, "float32", None),
    (7, 2, 5, 17, "constant", True, True, "float32", None),
    (64, 4, 64, 32, "constant", True, False, "float32", Sizes(16, 2, 4, 4)),
    (64, 3, 64, 65, "data", True, True, "float32", Sizes(16, 2, 2, 3)),
    (130, 1, 16, 16, "data", False, False, "bfloat16", Sizes(32, 2, 1, 1)),
    (130, 2, 24, 129, "constant", True, True, "float32", Sizes(64, 1, 2, 2)),
    (130, 1, 130, 33, "data", True, True, "bfloat16", Sizes(64, 2, 1, 1)),
    (256, 1, 64, 64, "constant", False, True, "float32", Sizes(128, 1, 1, 1)),
    (256, 2, 64, 64, "none", True, False, "bfloat16", None),
    (7, 2, 5, 17, "channels", False, True, "float32", None),
    (70, 3, 64, 64, "channels", True, True, "float32", Sizes(32, 2, 2, 3)),
    (256, 1, 16, 16, "channels", False, False, "bfloat16", None),
    (70, 2, 24, 33, "channels", True, True, "float32", Sizes(32, 2, 2, 2)),
    (70, 2, 24, 33, "channels", True, True, "float32", Sizes(32, 1, 2, 2)),
]
OFTEN = [CASES[i] for i in (1, 3, 8, 13)]


def given(case):
    """Arrays, and what else the kernel takes."""
    T, H, d, e, decay, packed, state, dtype, sizes = case
    documents = documents_of(T) if packed else None
    arrays = rounded(inputs(T, H, d, e, decay, state), dtype)
    return arrays, documents, {"starts": starts_of(documents) if packed else None, "sizes": sizes, "interpret": True}


IDS = lambda c: "-".join(str(x) for x in c[:8]) + (f"-{c[8].chunk}x{c[8].chunks}" if c[8] else "")


@tiers.parametrize("case", CASES, often=OFTEN, ids=IDS)
def test_equals_the_definition(case):
    """Values and every gradient, the decay's among them."""
    arrays, documents, rest = given(case)
    expected = exact({name: np.asarray(x.astype(jnp.float32)) for name, x in arrays.items()}, documents)
    assert_close(results(linear_recurrence, arrays, **rest), expected, 1e-5 if case[7] == "float32" else 0.02)


# The last group of heads lacks one; values with a column of their own; one group.
SHARED = [
    (70, 3, 64, 65, "data", True, True, "float32", Sizes(16, 2, 2, 2)),
    (70, 3, 64, 64, "constant", True, False, "float32", Sizes(32, 1, 2, 2)),
    (130, 4, 24, 32, "none", False, True, "bfloat16", None),
]


@tiers.parametrize("case", SHARED, often=SHARED[:1], ids=IDS)
def test_heads_may_share_queries_and_keys(case):
    """One query and one key of all heads: the definition, gradients too."""
    arrays, documents, rest = given(case)
    arrays |= {name: arrays[name][:, :, :1] for name in "qk"}
    expected = exact({name: np.asarray(x.astype(jnp.float32)) for name, x in arrays.items()}, documents)
    assert_close(results(linear_recurrence, arrays, **rest), expected, 1e-5 if case[7] == "float32" else 0.02)


def test_gradients_of_groups_are_added_in_float32():
    """Of four groups of heads, whose parts in bfloat16 would each be rounded."""
    arrays = rounded(inputs(64, 16, 128, 64, "data", False), "bfloat16")
    arrays |= {name: arrays[name][:, :, :1] for name in "qk"}
    loss = lambda arrays: jnp.sum(linear_recurrence(**arrays)[0].astype(jnp.float32))
    outputs = calls(jax.grad(loss), arrays)["linear_recurrence_backward"]["out_avals"]
    assert [(x.shape, x.dtype) for x in outputs[:2]] == [((B, 4, 64, 128), jnp.float32)] * 2


@pytest.mark.parametrize("case", [OFTEN[1], OFTEN[3]], ids=IDS)
def test_causality_is_bitwise(case):
    arrays, _, rest = given(case)
    assert_causal(linear_recurrence, arrays, -3, **rest)


# T, H, f, symmetric, e, documents, state, dtype, sizes
FEATURES = [
    (70, 2, 3, False, 16, True, True, "float32", Sizes(16, 2, 2, 2)),
    (40, 2, 16, True, 33, True, True, "float32", Sizes(16, 2, 2, 2)),
    (40, 2, 16, True, 33, True, True, "float32", Sizes(16, 1, 2, 2)),
    (64, 4, 16, True, 17, False, False, "bfloat16", None),
]


@tiers.parametrize("case", FEATURES, often=[FEATURES[2]], ids=IDS)
def test_features_on_chip(case):
    """Taylor features, made inside: values and gradients of narrow queries and keys, and of a state over features."""
    T, H, f, symmetric, e, packed, state, dtype, sizes = case
    phi = Taylor(f, symmetric)
    arrays = inputs(T, H, f, e, "none", False)
    if state:
        arrays["state"] = np.random.default_rng(1).standard_normal((B, H, phi.count, e)).astype(np.float32)
    arrays = rounded(arrays, dtype)
    documents = documents_of(T) if packed else None
    features = Features(f, *(tuple(x.tolist()) for x in phi.pairs))
    rest = {"starts": starts_of(documents) if packed else None, "sizes": sizes, "features": features}
    expected = exact({name: np.asarray(x.astype(jnp.float32)) for name, x in arrays.items()}, documents, phi)
    found = results(linear_recurrence, arrays, **rest, interpret=True)
    assert_close(found, expected, 1e-5 if dtype == "float32" else 0.02)


def run_simply(arrays, sizes=None, starts=None, interpret=True):
    return jax.jit(functools.partial(linear_recurrence, starts=starts, sizes=sizes, interpret=interpret))(**arrays)


@tiers.exhaustive
def test_chunks_and_blocks_change_nothing():
    """Any sizes give the same, but for rounding."""
    arrays = rounded(inputs(96, 2, 16, 33, "data", True), "float32")
    starts = jnp.asarray(starts_of(documents_of(96)))
    by = [run_simply(arrays, sizes, starts) for sizes in (Sizes(96, 1, 2, 2), Sizes(16, 3, 2, 2), Sizes(32, 1, 2, 2))]
    for other in by[1:]:
        assert_close(*({name: np.asarray(x) for name, x in zip(("o", "end"), y)} for y in (other, by[0])), 2e-6)


@tiers.exhaustive
def test_states_compose():
    """Two pieces, the second from the state after the first, are one pass; a document goes on over the cut."""
    arrays, sizes, cut = rounded(inputs(80, 2, 16, 17, "data", True), "float32"), Sizes(16, 2, 2, 2), 50
    documents = documents_of(80)
    whole = run_simply(arrays, sizes, jnp.asarray(starts_of(documents)))
    state, parts = arrays["state"], []
    for piece in (slice(0, cut), slice(cut, 80)):
        before = documents[:, :1] if piece.start == 0 else documents[:, cut - 1 : cut]
        index = documents[:, piece] - (0 if piece.start == 0 else before)
        own = {name: x[:, piece] for name, x in arrays.items() if name != "state"}
        o, state = run_simply({**own, "state": state}, sizes, jnp.asarray(starts_of(index)))
        parts.append(o)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole[0], atol=2e-5)
    np.testing.assert_allclose(state, whole[1], atol=2e-5)


# decay, documents, H, heads of queries and keys, d, e, sizes
RACES = [
    ("constant", False, 2, 2, 16, 16, None),
    ("data", True, 2, 2, 16, 33, Sizes(16, 2, 2, 2)),
    ("constant", True, 3, 3, 64, 64, Sizes(16, 2, 2, 2)),  # the last group of heads is not whole
    ("channels", True, 3, 3, 64, 64, Sizes(16, 2, 2, 2)),
    ("data", True, 3, 1, 64, 64, Sizes(16, 2, 2, 2)),
]


@tiers.exhaustive
@pytest.mark.parametrize("decay, packed, heads, shared, d, e, sizes", RACES)
def test_no_races(decay, packed, heads, shared, d, e, sizes, capfd):
    """Forward and backward on a simulated TPU whose two cores share heads, with NaN in what was never written and
    behind the ends of arrays, of positions and of heads: what the definition gives."""
    arrays = rounded(inputs(40, heads, d, e, decay, True), "float32")
    arrays |= {name: arrays[name][:, :, :shared] for name in "qk"}
    documents = documents_of(40) if packed else None
    starts = starts_of(documents) if packed else None
    simulate = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    simulated = results(linear_recurrence, arrays, starts=starts, sizes=sizes, interpret=simulate)
    assert_close(simulated, exact(arrays, documents), 1e-5)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@tiers.often("constant-False-128-16", "data-True-128-1")
@pytest.mark.parametrize(
    "decay, packed, e, keys",
    [("constant", False, 128, 16), ("data", True, 129, 16), ("channels", False, 128, 16), ("data", True, 128, 1)],
)
def test_declared_bytes_are_those_of_the_blocks(decay, packed, e, keys):
    """Within 5 %, with 16 heads of queries and keys, or one of all. Of the grid, cores may share all but the blocks of
    positions, which hand states on. The FLOPs, too, are those of `kernel_flops`, where nothing is padded."""
    arrays = rounded(inputs(1024, 16, 128, e, decay, False), "bfloat16")
    arrays |= {name: arrays[name][:, :, :keys] for name in "qk"}
    starts = jnp.asarray(starts_of(documents_of(1024))) if packed else None
    loss = lambda arrays: jnp.sum(linear_recurrence(**arrays, starts=starts)[0].astype(jnp.float32))
    counted = kernel_flops(arrays["q"], arrays["u"], tuning.kind(), channels=decay == "channels")
    for name, params in calls(jax.grad(loss), arrays).items():
        assert e % 128 or params["cost_estimate"].flops == pytest.approx(counted[name])
        assert params["cost_estimate"].bytes_accessed == pytest.approx(bytes_of_blocks(params), rel=0.05)
        assert params["compiler_params"].dimension_semantics == ("parallel", "parallel", "arbitrary")


def test_a_constant_has_no_gradient_to_compute():
    """Decays that nothing is differentiated by cost the backward nothing; those that are get theirs."""
    arrays = rounded(inputs(32, 2, 16, 16, "constant", False), "float32")
    logs = arrays.pop("log_decay")
    loss = lambda arrays, logs: jnp.sum(linear_recurrence(**arrays, log_decay=logs)[0])
    outputs = lambda wanted: len(calls(jax.grad(loss, wanted), arrays, logs)["linear_recurrence_backward"]["out_avals"])
    assert outputs((0, 1)) == outputs(0) + 1 == 4


def test_sizes():
    """Groups of heads for any count; a state that no chip holds has none."""
    of = lambda T, H, w: jax.ShapeDtypeStruct((1, T, H, w), jnp.bfloat16)
    heads = lambda H, d, e, T=4096: default_sizes(of(T, H, d), of(T, H, e), "v6e").forward_heads
    assert [heads(H, 128, 128) for H in (1, 7, 12, 16, 17, 25)] == [1, 7, 6, 8, 6, 5]
    assert heads(32, 16, 64) == 8 and heads(4, 16, 16) == 4 and heads(25, 64, 64) % 2 == 0
    assert default_sizes(of(640, 8, 128), of(640, 8, 128), "v6e").chunks in (1, 5)
    assert default_sizes(of(7, 8, 128), of(7, 8, 128), "v6e") == Sizes(16, 1, 8, 4)
    assert default_sizes(of(4096, 1, 8192), of(4096, 1, 8192), "v6e") is None
    wide = [jax.ShapeDtypeStruct((1, 512, 2, w), jnp.float32) for w in (2048, 256)]  # two chunks do not compile on v5p
    assert default_sizes(*wide, "v5p").chunks == 1 and default_sizes(*wide, "v6e").chunks == 4
    for kind in tuning.KINDS.values():
        for d, e, H, channels in (
            (256, 128, 16, False),
            (512, 512, 8, False),
            (1024, 1024, 4, False),
            (128, 128, 16, True),
        ):
            s = default_sizes(of(4096, H, d), of(4096, H, e), kind, channels=channels)
            for n, needed in ((s.forward_heads, plan_lib.forward_bytes), (s.backward_heads, plan_lib.backward_bytes)):
                assert needed(d, n, s.chunk, s.chunks, d, e, 2, channels=channels) <= tuning.vmem_limit(kind)


@pytest.mark.parametrize("change, says", [
    ({"k": (1, 9, 2, 7)}, "do not fit"), ({"u": (1, 9, 3, 8)}, "do not fit"), ({"u": (1, 9, 2, 0)}, "no size may be 0"),
    ({"log_decay": (3,)}, r"log_decay \(3,\); expected \[2\] or \[1, 9, 2\] or \[1, 9, 2, 8\]"),
    ({"starts": (1, 8)}, "starts"), ({"log_decay": (1, 9, 2, 8), "sizes": Sizes(48, 1, 2, 2)}, "chunk 16, 32, 64, 128"),
    ({"state": (1, 2, 8, 9)}, "state"), ({"dtype": "float16"}, "bfloat16, or all float32"),
    ({"starts": (1, 9), "starts_dtype": "float32"}, "signed integers"),
    ({"sizes": Sizes(8)}, "chunk a multiple of 16"), ({"sizes": Sizes(16, 0)}, "chunks 1 or more"),
    ({"sizes": Sizes(16, 1, 1, 2)}, "all 2 heads, or so many"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    shapes = {"q": (1, 9, 2, 8), "k": (1, 9, 2, 8), "u": (1, 9, 2, 8)} | change
    dtype, of_starts = shapes.pop("dtype", "float32"), shapes.pop("starts_dtype", "int32")
    of = lambda name: dtype if name in "qku" else of_starts if name == "starts" else "float32"
    args = {n: jnp.zeros(x, of(n)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        linear_recurrence(**args, interpret=True)
