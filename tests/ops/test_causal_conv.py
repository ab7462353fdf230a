"""The causal convolution against its formula, in float64, packed and cut anywhere."""

import jax
import numpy as np
import pytest

from attnlab.ops.causal_conv import causal_conv
from attnlab.ops.documents import document_index

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 4, 4, 4]])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def inputs(taps):
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 9, 3)), rng.standard_normal((taps, 3))


@jax.jit
def run(x, kernel, segments, before, tail):
    return causal_conv(x, kernel, None if segments is None else document_index(segments, before), tail)


def written_out(x, kernel, segments):
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        for i in range(len(kernel)):
            if t >= i and len(set(segments[b, t - i : t + 1])) == 1:
                y[b, t] += kernel[-1 - i] * x[b, t - i]
    return y


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_formula(taps):
    """Each position sums the positions before it in its document."""
    x, kernel = inputs(taps)
    y, _ = run(x, kernel, SEGMENTS, None, None)
    np.testing.assert_allclose(y, written_out(x, kernel, SEGMENTS), atol=1e-13)
    y, _ = run(x, kernel, None, None, None)
    np.testing.assert_allclose(y, written_out(x, kernel, np.ones_like(SEGMENTS)), atol=1e-13)


@pytest.mark.parametrize("cut", [[1] * 9, [2, 1, 5, 1], [4, 5]])
def test_cut_anywhere(cut):
    """The tail carries what the next piece needs, and nothing of another document."""
    x, kernel = inputs(4)
    tail, before, first, parts = None, np.full((2,), -1), 0, []
    for n in cut:
        segments = SEGMENTS[:, first : first + n]
        part, tail = run(x[:, first : first + n], kernel, segments, before, tail)
        before, first = segments[:, -1], first + n
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), written_out(x, kernel, SEGMENTS), atol=1e-13)


def test_document_index():
    """0 goes on with what came before; every change of the id begins another."""
    index, segments = jax.jit(document_index), np.asarray([[5, 5, 0, 7]])
    np.testing.assert_array_equal(index(segments, np.asarray([5])), [[0, 0, 1, 2]])
    np.testing.assert_array_equal(index(segments), [[1, 1, 2, 3]])
