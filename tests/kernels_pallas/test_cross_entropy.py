"""The kernels of cross-entropy, interpreted, against log-softmax in float64: values and every gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuning
from kernels_pallas.cross_entropy import Sizes, cross_entropy, default_sizes
from tests import tiers
from tests.kernels_pallas.recurrences import bytes_of_blocks, calls
from tests.mixers import precision

SMALL = Sizes(128, 128, 128, 128)


def inputs(N, D, V, sharp=2.0):
    """hidden, kernel and targets, the second row without one, the third with a column behind the last."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(N, D)), sharp * rng.normal(size=(D, V)) / math.sqrt(D)
    targets = rng.integers(0, V, N).astype(np.int32)
    targets[1:3] = -1, V
    return hidden, kernel, targets


def results(fn, hidden, kernel, targets):
    """lse, logit and both gradients, of cotangents of either sign."""

    def loss(hidden, kernel):
        lse, logit = fn(hidden, kernel, targets)
        n = jnp.arange(len(targets))
        return jnp.sum(jnp.cos(n) * lse) + jnp.sum(jnp.sin(n) * logit), (lse, logit)

    gradients, values = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, kernel)
    return [np.asarray(x, np.float64) for x in (*values, *gradients)]


def formula(hidden, kernel, targets):
    logits = hidden @ kernel
    here = jnp.arange(kernel.shape[1]) == targets[:, None]
    return jax.nn.logsumexp(logits, axis=1), jnp.sum(jnp.where(here, logits, 0), axis=1)


def defined(hidden, kernel, targets):
    with jax.enable_x64(True):
        return results(formula, jnp.asarray(hidden, "float64"), jnp.asarray(kernel, "float64"), targets)


def worst(found, expected):
    """The largest error of each, of its largest number."""
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)]


# N, D, V, dtype, tiles: rows and columns that no tile divides, fewer than a tile's, several parts of a tile.
CASES = [
    (300, 40, 301, "float32", SMALL),
    (7, 128, 130, "float32", None),
    (130, 24, 1100, "float32", Sizes(512, 256, 256, 512)),
    (520, 128, 640, "bfloat16", Sizes(512, 256, 256, 512)),
    (257, 136, 127, "float32", None),
    (300, 40, 301, "bfloat16", SMALL),
]


@tiers.often("300-40-301-float32-sizes0", "520-128-640-bfloat16-sizes3", "7-128-130-float32-None")
@pytest.mark.parametrize(("N", "D", "V", "dtype", "sizes"), CASES)
def test_is_log_softmax(N, D, V, dtype, sizes):
    """Log-partitions, targets' logits (0 without a target) and the gradients that follow from any two cotangents."""
    hidden, kernel, targets = inputs(N, D, V)
    hidden, of_dtype = hidden.astype(jnp.dtype(dtype)), kernel.astype(jnp.dtype(dtype))
    run = lambda *arrays: cross_entropy(*arrays, interpret=True, sizes=sizes)
    found = results(run, hidden, kernel.astype(np.float32), targets)
    expected = defined(hidden.astype(np.float64), of_dtype.astype(np.float64), targets)
    assert max(worst(found, expected)) < (2e-6 if dtype == "float32" else 8e-3)
    assert not found[1][1:3].any()


def test_likely_targets_keep_their_small_gradients():
    """Where a target's probability is near 1 its gradient is nearly nothing, and bfloat16 must not round it away."""
    hidden, kernel, targets = inputs(128, 128, 256)
    targets = np.clip(targets, 0, 255)
    kernel = kernel.astype(jnp.bfloat16)
    hidden = (kernel.astype(np.float64).T[targets] * 2.5 + hidden / 20).astype(jnp.bfloat16)
    wide = [x.astype(np.float64) for x in (hidden, kernel)]
    p = scipy.special.softmax(wide[0] @ wide[1], axis=1)
    likely = p[np.arange(128), targets] > 0.95
    assert likely.sum() > 10
    expected = (p - np.eye(256)[targets]) @ wide[1].T
    nll = lambda h, w: jnp.sum(jnp.subtract(*cross_entropy(h, w, targets, interpret=True, sizes=SMALL)))
    found = jax.jit(jax.grad(nll))(hidden, kernel)
    error = np.abs(np.asarray(found, np.float64) - expected).max(1) / np.abs(expected).max(1)
    assert error[likely].max() < 2e-2


def test_nothing_but_kernels_has_logits_and_bytes_are_those_of_the_blocks():
    """No array outside of the kernels is as large as the logits; declared bytes are what the blocks move."""
    N, D, V = 2048, 256, 4096
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
    loss = lambda h, w, t: (lambda lse, logit: jnp.sum(lse * lse) - jnp.sum(logit))(*cross_entropy(h, w, t))
    arrays = of(N, D), of(D, V, dtype="float32"), of(N, dtype="int32")
    with tuning.device_kind("v6e"):
        found = {**calls(jax.grad(loss, (0, 1)), *arrays), **calls(loss, *arrays)}
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arrays)
    assert set(found) == {"cross_entropy_value", "cross_entropy_forward", "cross_entropy_backward"}
    for name, params in found.items():
        assert params["cost_estimate"].bytes_accessed == pytest.approx(bytes_of_blocks(params), rel=0.05), name
    for eqn in precision.equations(jaxpr.jaxpr):
        for out in eqn.outvars:
            assert math.prod(out.aval.shape) < N * V, eqn


def test_no_races():
    """Tiles of rows and of columns in any order that the grid allows, memory that nobody wrote being NaN."""
    hidden, kernel, targets = inputs(140, 128, 260)
    expected = defined(hidden, kernel, targets)
    params = pltpu.InterpretParams(detect_races=True)
    run = lambda *arrays: cross_entropy(*arrays, interpret=params, sizes=SMALL)
    found = results(run, hidden.astype(np.float32), kernel.astype(np.float32), targets)
    assert max(worst(found, expected)) < 2e-6
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_what_does_not_fit_is_refused():
    hidden, kernel, targets = (jnp.asarray(x) for x in inputs(9, 8, 12))
    hidden, kernel = hidden.astype("float32"), kernel.astype("float32")
    for arrays, said in (
        ((hidden, kernel[1:], targets), "expected hidden"), ((hidden[:0], kernel, targets[:0]), "no size may be 0"),
        ((hidden.astype("float16"), kernel, targets), "allowed: bfloat16, float32"),
        ((hidden, kernel.astype("int32"), targets), "a floating dtype"),
        ((hidden, kernel, targets.astype("float32")), "signed integers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"cross_entropy: .*{said}"):
            cross_entropy(*arrays, interpret=True)
    with pytest.raises(ValueError, match="columns=100 .*multiples of 128"):
        cross_entropy(hidden, kernel, targets, interpret=True, sizes=Sizes(columns=100))
    assert default_sizes(1024, 2**18, 1024, 2, "v6e") is None
    with tuning.device_kind("v6e"), pytest.raises(ValueError, match="width 262144 fits"):
        cross_entropy(jnp.zeros((1, 2**18)), jnp.zeros((2**18, 1)), targets[:1], interpret=True)
