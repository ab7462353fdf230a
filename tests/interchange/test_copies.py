"""Numbers of a checkpoint arrive whole: widened, shifted and turned as NumPy's own expressions say, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.interchange import copies, pieces
from attnlab.interchange.pieces import Piece

ROWS, COLUMNS = 2 * copies._BLOCK[0] + 3, 2 * copies._BLOCK[1] + 5  # beyond whole blocks


def drawn(shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("kept", [np.float32, jnp.bfloat16])
def test_a_copy_is_the_formula(stored, kept, turned):
    source = drawn((ROWS, COLUMNS), stored)
    target = copies.empty((COLUMNS, ROWS) if turned else (ROWS, COLUMNS), kept)
    into = target.T if turned else target
    copies.copy(source, into)
    np.testing.assert_array_equal(into, source.astype(np.float32).astype(kept))
    copies.copy(source, into, shift=1.0, factor=0.3)
    expected = (source.astype(np.float32) + np.float32(1)) * np.float32(0.3)
    np.testing.assert_array_equal(into, expected.astype(kept))


def test_wider_types_lose_nothing():
    source = drawn((3, 5, 7), np.float64)
    target = copies.empty(source.shape, np.float64)
    copies.copy(source, target, shift=1e-12)
    np.testing.assert_array_equal(target, source + 1e-12)


@pytest.mark.parametrize("form", ["same", "transposed", "taps"])
@pytest.mark.parametrize("rows", [None, "together", "scattered"])
def test_the_tasks_of_a_piece_are_its_slice(form, rows, monkeypatch):
    """Each slice of a part is what indexing all of it gives, however many tasks it takes."""
    monkeypatch.setattr(pieces, "_TASK", 40)
    shape = {"same": (24, 9), "transposed": (24, 9), "taps": (24, 1, 3)}[form]
    array = drawn(shape, jnp.bfloat16)
    order = {None: None, "together": np.arange(5, 21), "scattered": np.random.default_rng(1).permutation(24)[:17]}[rows]
    piece = Piece("leaf", None, "tensor", shape, form, order, shift=0.5)
    taken = array if order is None else array[order]
    whole = {"same": taken, "transposed": taken.T, "taps": taken[:, 0].T if form == "taps" else None}[form]
    for index in [(slice(None), slice(None)), (slice(1, 3), slice(2, 8)), (slice(0, 2), slice(7, 9))]:
        expected = whole[index].astype(np.float32) + np.float32(0.5)
        out = np.full(expected.shape, np.nan, np.float32)
        tasks = list(piece.reading(array, index, out))
        assert sum(task() for task in reversed(tasks)) == out.size
        np.testing.assert_array_equal(out, expected)
    assert len(list(piece.reading(array, (slice(None),) * 2, np.empty(whole.shape, np.float32)))) > 1


def test_a_device_of_this_host_takes_an_array_as_it_is():
    """No second copy of a shard is held: on a CPU the parameter is the memory that the numbers were read to."""
    for size in (1, 1000, 2**21):
        out = copies.empty((size,), np.float32)
        assert jax.device_put(out, jax.devices()[0]).unsafe_buffer_pointer() == out.ctypes.data
