"""Which tensor of a checkpoint holds which part of which parameter: one table for reading, writing and checking.

attnlab stacks the layers of one place of the pattern in one array, and its matrices are [in, out]; published ones are a
tensor per layer, [out, in]. Some publish several matrices in one tensor, whose rows are then in an order of their own.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from attnlab.errors import UserError
from attnlab.interchange import copies
from attnlab.interchange.safetensors import Tensor

FORMS = ("same", "transposed", "taps")
_TASK = 2**20  # numbers that a thread copies at once


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """One layer's part of a parameter, and the tensor that holds it.

    Attributes:
      leaf: dotted path of the parameter.
      repeat: its index in the stack of layers; None where there is no stack.
      tensor: name.
      shape: of the tensor.
      form: same: an embedding [V, D], a vector, a number; transposed: a matrix, [out, in] in the tensor; taps:
        [channels, 1, taps] in the tensor, [taps, channels] here.
      rows: int [n], the tensor's row for each column here (of a vector: each entry); None: all rows in order.
      shift: what is added on the way in, and taken away on the way out: 1 where the tensor holds w of a norm's `1 + w`.
      factor: what it is multiplied by on the way in; only where nothing goes out.
    """

    leaf: str
    repeat: int | None
    tensor: str
    shape: tuple[int, ...]
    form: str = "same"
    rows: np.ndarray | None = None
    shift: float = 0.0
    factor: float = 1.0

    @property
    def here(self) -> tuple[int, ...]:
        """Shape of the part of the parameter."""
        if not self.shape:
            return ()
        count = self.shape[0] if self.rows is None else len(self.rows)
        return {"same": (count, *self.shape[1:]), "transposed": (*self.shape[1:], count),
                "taps": (self.shape[-1], count)}[self.form]  # fmt: skip

    def reading(self, array: np.ndarray, index: tuple[slice, ...], out: np.ndarray) -> Iterator[Callable[[], int]]:
        """Tasks, for threads in any order, that copy the slice `index` of the part from the tensor's array.

        Nothing else of it is touched. A task returns how many numbers it read.

        Args:
          out: of the slice's shape.
        """
        if not self.shape:
            yield lambda: self._copied(array, out)
            return
        if self.form == "same":
            taken, rest, out_rows = index[0], index[1:], out
        else:
            taken, rest, out_rows = index[1], (index[0],), out.T
        if self.form == "taps":
            rest = (0, *rest)
        rows = self._rows(taken)
        step = max(1, _TASK // max(1, math.prod(out_rows.shape[1:])))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            which = slice(some.start, some.stop) if isinstance(some, range) else some
            yield functools.partial(self._copied, array, out_rows[first : first + step], (which, *rest))

    def _copied(self, array: np.ndarray, out: np.ndarray, index: tuple[Any, ...] = ()) -> int:
        copies.copy(array[index], out, self.shift, self.factor)
        return out.size

    def _rows(self, columns: slice) -> range | np.ndarray:
        """The tensor's rows of some columns: a range where they lie together, so that no others are read."""
        if self.rows is None:
            return range(*columns.indices(self.shape[0]))
        rows = self.rows[columns]
        together = len(rows) > 0 and (np.diff(rows) == 1).all()
        return range(int(rows[0]), int(rows[-1]) + 1) if together else rows

    def write(self, value: np.ndarray, array: np.ndarray) -> None:
        """Puts the part into the tensor's array, which is of the type that is wanted."""
        value = np.asarray(value)
        if self.shift:
            value = value - np.asarray(self.shift, value.dtype)
        rows = self.rows if self.rows is not None else slice(None) if self.shape else ...
        if self.form == "taps":
            array[rows, 0] = value.T
        else:
            array[rows] = value.T if self.form == "transposed" else value


@dataclasses.dataclass(frozen=True)
class Filled:
    """A parameter that no tensor holds: every entry is `value` at first."""

    leaf: str
    value: float


@dataclasses.dataclass(frozen=True)
class Table:
    """All of a model.

    Attributes:
      pieces: in the order in which tensors are written.
      filled: of parameters that the checkpoint knows nothing of.
    """

    pieces: list[Piece]
    filled: tuple[Filled, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return {piece.tensor: piece.shape for piece in self.pieces}

    def parts(self) -> dict[str, list[Piece]]:
        """The pieces of each tensor."""
        found: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.tensor, []).append(piece)
        return found

    def require_whole(self, leaves: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError unless the table gives every part of every parameter once, and takes all of each tensor.

        Args:
          leaves: shapes of the model's parameters by dotted path.
        """
        given: dict[str, list[int | None]] = {}
        for piece in self.pieces:
            wanted = leaves.get(piece.leaf)
            here = wanted if piece.repeat is None or wanted is None else wanted[1:]
            if here != piece.here:
                raise UserError(
                    f"the model's parameter {piece.leaf} is {_shown(here)}, what the checkpoint's "
                    f"config.json says of {piece.tensor} makes it {_shown(piece.here)}; undo the changes to model.*"
                )
            given.setdefault(piece.leaf, []).append(piece.repeat)
        known = given.keys() | {filled.leaf for filled in self.filled}
        if unknown := sorted(leaves.keys() - known):
            raise UserError(
                f"the checkpoint has nothing for the model's parameter {unknown[0]} ({len(unknown)} such); undo the "
                "changes to model.*"
            )
        for leaf, repeats in given.items():
            stack = [None] if repeats == [None] else list(range(leaves[leaf][0]))
            assert sorted(repeats, key=lambda r: -1 if r is None else r) == stack, leaf
        for name, pieces in self.parts().items():
            if not pieces[0].shape:
                continue
            rows = [np.arange(p.shape[0]) if p.rows is None else p.rows for p in pieces]
            assert (np.sort(np.concatenate(rows)) == np.arange(pieces[0].shape[0])).all(), name


def _shown(shape: Any) -> str:
    return "not there" if shape is None else str(list(shape))


def read_leaf(
    leaf: jax.ShapeDtypeStruct, pieces: list[Piece], filled: Filled | None, tensors: Mapping[str, Tensor],
    read: Callable[[int], None], threads: concurrent.futures.Executor,
) -> jax.Array:  # fmt: skip
    """A parameter, each device's shard from the bytes of its own slice.

    Args:
      leaf: shape, type and sharding.
      pieces: of it.
      filled: what it is where it has no pieces.
      tensors: of the folder, by the names in the pieces.
      read: told the bytes of each slice.
      threads: that copy.
    """
    by_repeat = {piece.repeat: piece for piece in pieces}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True))
        if filled is not None:
            return np.full(shape, filled.value, leaf.dtype)
        out = copies.empty(shape, leaf.dtype)
        if None in by_repeat:
            wanted = [(by_repeat[None], index, out)]
        else:
            layers = range(*index[0].indices(leaf.shape[0]))
            wanted = [(by_repeat[layer], index[1:], out[i, ...]) for i, layer in enumerate(layers)]
        for piece, at, part in wanted:
            array = tensors[piece.tensor].mapped()
            for count in threads.map(lambda task: task(), piece.reading(array, at, part)):
                read(count * array.dtype.itemsize)
        return out

    # One shard at a time is held here, and read once for all devices that hold it.
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    shared: dict[str, list[Any]] = {}
    for device, index in places.items():
        shared.setdefault(str(index), []).append(device)
    arrays = {}
    for devices in shared.values():
        value = shard(places[devices[0]])
        arrays |= {device: jax.device_put(value, device).block_until_ready() for device in devices}
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [arrays[device] for device in places])
