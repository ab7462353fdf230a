"""The delta rule's TPU kernels, interpreted: values and all gradients against the definition in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.ops.delta_rule import DELTA_RULE
from kernels_pallas import tuning
from kernels_pallas.delta_rule import Sizes, default_sizes, delta_rule
from kernels_pallas.delta_rule import plan as plan_lib
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


def inputs(length, heads, d, e, state, seed=0, channels=False):
    """Keys of length 1 with cosines of about a half, the hard case for the inverse; strengths up to 1.5; some
    channels keep nothing."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k = normal(B, length, heads, d), normal(B, length, heads, d) + normal(1, 1, heads, d)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": q, "k": k, "v": normal(B, length, heads, e)}
    shape = (B, length, heads, d)[: 4 if channels else 3]
    arrays["log_decay"] = np.float32(-rng.exponential(0.2, shape) * (rng.random(shape) < 0.8))
    if channels:
        arrays["log_decay"][rng.random(shape) < 0.02] = -np.inf
    arrays["beta"] = np.float32(1.5 * rng.random((B, length, heads)) * (rng.random((B, length, heads)) < 0.9))
    if state:
        arrays["state"] = normal(B, heads, d, e)
    return arrays


def definition(q, k, v, log_decay, beta, state=None, documents=None):
    return DELTA_RULE.table["definition"].run(q, k, v, log_decay, beta, documents, state, chunk=1)


def exact(arrays, documents):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(np.asarray(x, np.float32), jnp.float64) for name, x in arrays.items()}
        return results(definition, arrays, documents=documents)


# T, H, d, e, documents, state, dtype, sizes, whether channels have their own decays; several blocks of several chunks
# where sizes are given.
CASES = [
    (1, 3, 16, 16, False, True, "float32", None, False),
    (7, 2, 5, 17, True, True, "float32", None, False),
    (64, 4, 64, 32, True, False, "float32", Sizes(16, 2, 4, 4), False),
    (130, 2, 24, 65, True, True, "float32", Sizes(64, 1, 2, 2), False),
    (130, 3, 64, 64, True, True, "float32", Sizes(32, 2, 2, 3), False),
    (130, 1, 130, 33, True, True, "bfloat16", Sizes(64, 2, 1, 1), False),
    (256, 1, 64, 64, False, True, "float32", Sizes(128, 1, 1, 1), False),
    (256, 2, 64, 64, True, False, "bfloat16", None, False),
    (7, 2, 5, 17, True, True, "float32", None, True),
    (130, 2, 24, 65, True, True, "float32", Sizes(64, 1, 2, 2), True),
    (70, 2, 64, 64, False, True, "float32", Sizes(16, 2, 2, 2), True),
    (130, 1, 64, 64, True, False, "bfloat16", Sizes(128, 2, 1, 1), True),
    (70, 2, 24, 65, True, True, "float32", Sizes(32, 1, 2, 2), True),
]
OFTEN = [CASES[i] for i in (5, 12)]
IDS = lambda c: "-".join(str(x) for x in (*c[:7], c[8]))


def given(case):
    """Arrays, and what else the kernel takes."""
    T, H, d, e, packed, state, dtype, sizes, channels = case
    documents = documents_of(T) if packed else None
    arrays = rounded(inputs(T, H, d, e, state, channels=channels), dtype)
    return arrays, documents, {"starts": starts_of(documents) if packed else None, "sizes": sizes, "interpret": True}


@tiers.parametrize("case", CASES, often=OFTEN, ids=IDS)
def test_equals_the_definition(case):
    """Values and every gradient; positions that write nothing or do not decay among them."""
    arrays, documents, rest = given(case)
    found = results(delta_rule, arrays, **rest)
    assert_close(found, exact(arrays, documents), 2e-5 if case[6] == "float32" else 0.03)


@pytest.mark.parametrize("case", OFTEN, ids=IDS)
def test_causality_is_bitwise(case):
    arrays, _, rest = given(case)
    assert_causal(delta_rule, arrays, -0.5, **rest)


def run_simply(arrays, sizes=None, starts=None):
    return jax.jit(functools.partial(delta_rule, starts=starts, sizes=sizes, interpret=True))(**arrays)


@tiers.exhaustive
def test_chunks_and_blocks_change_nothing():
    """Any sizes give the same, but for rounding."""
    arrays = rounded(inputs(96, 2, 16, 33, True), "float32")
    starts = jnp.asarray(starts_of(documents_of(96)))
    by = [run_simply(arrays, sizes, starts) for sizes in (Sizes(128, 1, 2, 2), Sizes(16, 3, 2, 2), Sizes(32, 1, 2, 2))]
    for other in by[1:]:
        assert_close(*({name: np.asarray(x) for name, x in zip(("o", "end"), y)} for y in (other, by[0])), 5e-6)


@tiers.exhaustive
def test_states_compose():
    """Two pieces, the second from the state after the first, are one pass; a document goes on over the cut."""
    arrays, sizes, cut = rounded(inputs(80, 2, 16, 17, True), "float32"), Sizes(16, 2, 2, 2), 50
    documents = documents_of(80)
    whole = run_simply(arrays, sizes, jnp.asarray(starts_of(documents)))
    state, parts = arrays["state"], []
    for piece in (slice(0, cut), slice(cut, 80)):
        index = documents[:, piece] - (0 if piece.start == 0 else documents[:, cut - 1 : cut])
        own = {name: x[:, piece] for name, x in arrays.items() if name != "state"}
        o, state = run_simply({**own, "state": state}, sizes, jnp.asarray(starts_of(index)))
        parts.append(o)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole[0], atol=2e-5)
    np.testing.assert_allclose(state, whole[1], atol=2e-5)


# documents, H, d, e, sizes, whether channels have their own decays
RACES = [
    (False, 2, 16, 16, None, False),
    (True, 3, 64, 64, Sizes(16, 2, 2, 2), False),  # the last group of heads is not whole
    (True, 2, 16, 33, Sizes(16, 2, 2, 2), True),
]


@tiers.exhaustive
@pytest.mark.parametrize("packed, heads, d, e, sizes, channels", RACES)
def test_no_races(packed, heads, d, e, sizes, channels, capfd):
    """Forward and backward on a simulated TPU whose two cores share heads, with NaN in what was never written and
    behind the ends of arrays, of positions and of heads: what the definition gives."""
    arrays = rounded(inputs(40, heads, d, e, True, channels=channels), "float32")
    documents = documents_of(40) if packed else None
    starts = starts_of(documents) if packed else None
    simulate = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    simulated = results(delta_rule, arrays, starts=starts, sizes=sizes, interpret=simulate)
    assert_close(simulated, exact(arrays, documents), 2e-5)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@tiers.often("False")
@pytest.mark.parametrize("channels", [False, True])
def test_declared_bytes_are_those_of_the_blocks(channels):
    """Within 5 %."""
    arrays = rounded(inputs(512, 4, 128, 128, False, channels=channels), "bfloat16")
    starts = jnp.asarray(starts_of(documents_of(512)))
    loss = lambda arrays: jnp.sum(delta_rule(**arrays, starts=starts)[0].astype(jnp.float32))
    found = calls(jax.grad(loss), arrays)
    assert set(found) == {f"delta_rule_{'channels_' * channels}{direction}" for direction in ("forward", "backward")}
    for params in found.values():
        assert params["cost_estimate"].bytes_accessed == pytest.approx(bytes_of_blocks(params), rel=0.05)


def test_a_constant_has_no_gradient_to_compute():
    """Decays that nothing is differentiated by cost the backward nothing."""
    arrays = rounded(inputs(32, 2, 16, 16, False), "float32")
    logs = arrays.pop("log_decay")
    loss = lambda arrays, logs: jnp.sum(delta_rule(**arrays, log_decay=logs)[0])
    outputs = lambda wanted: len(calls(jax.grad(loss, wanted), arrays, logs)["delta_rule_backward"]["out_avals"])
    assert outputs((0, 1)) == outputs(0) + 1 == 5


def test_sizes():
    """Groups of heads for any count that fit into fast memory; a state that no chip holds has none."""
    of = lambda T, H, w: jax.ShapeDtypeStruct((1, T, H, w), jnp.bfloat16)
    assert default_sizes(of(7, 8, 128), of(7, 8, 128), "v6e").chunk == 16
    assert default_sizes(of(4096, 1, 8192), of(4096, 1, 8192), "v6e") is None
    for kind in tuning.KINDS.values():
        for d, e, H in ((128, 128, 16), (128, 256, 7), (256, 512, 8), (512, 1024, 4)):
            for channels in (False, True):
                s = default_sizes(of(4096, H, d), of(4096, H, e), kind, channels)
                of_both = (s.forward_heads, plan_lib.forward_bytes), (s.backward_heads, plan_lib.backward_bytes)
                for n, needed in of_both:
                    assert needed(n, s.chunk, s.chunks, d, e, 2, channels=channels) <= tuning.vmem_limit(kind)


@pytest.mark.parametrize("change, says", [
    ({"k": (1, 9, 2, 7)}, "do not fit"), ({"v": (1, 9, 3, 8)}, "do not fit"), ({"v": (1, 9, 2, 0)}, "no size may be 0"),
    ({"log_decay": (2,)}, r"log_decay \(2,\); expected \[1, 9, 2\] or \[1, 9, 2, 8\]"), ({"beta": (1, 9, 3)}, "beta"),
    ({"starts": (1, 8)}, "starts"), ({"state": (1, 2, 8, 9)}, "state"), ({"dtype": "float16"}, "bfloat16, or all flo"),
    ({"starts": (1, 9), "starts_dtype": "float32"}, "signed integers"), ({"sizes": Sizes(8)}, "chunk a multiple of 16"),
    ({"sizes": Sizes(48, 1, 2, 2)}, "chunk 16, 32, 64, 128"), ({"sizes": Sizes(16, 1, 1, 2)}, "all 2 heads, or so m"),
])  # fmt: skip
def test_refusals(change, says):
    """Each names the value and what is allowed."""
    wide, narrow = (1, 9, 2, 8), (1, 9, 2)
    shapes = {"q": wide, "k": wide, "v": wide, "log_decay": narrow, "beta": narrow} | change
    dtype, of_starts = shapes.pop("dtype", "float32"), shapes.pop("starts_dtype", "int32")
    of = lambda name: dtype if name in "qkv" else of_starts if name == "starts" else "float32"
    args = {n: jnp.zeros(x, of(n)) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=says):
        delta_rule(**args, interpret=True)
