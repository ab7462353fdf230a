"""safetensors files: headers, slices by memory map, and writing tensor by tensor.

A file is the length of its header (uint64, little-endian), the header (JSON: name to dtype, shape and offsets), and the
data. A folder of several has an index, `model.safetensors.index.json`. Nothing here is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlab.errors import Damaged, UserError
from attnlab.train import files

DTYPES = {"F64": np.float64, "F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}
NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4,
          "I64": 8, "U64": 8} | {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()}  # fmt: skip
_LARGEST_HEADER = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
      file: that holds it.
      dtype: as the header names it.
      begin, end: bytes of the file.
    """

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def mapped(self) -> np.ndarray:
        """The array on a memory map: only what is read of it is loaded.

        Raises:
          UserError: its numbers are of a type that is not read.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.name!r} has dtype {self.dtype}; allowed: {', '.join(DTYPES)} (weights that "
                "are not quantised)"
            )
        return _map(self.file)[self.begin : self.end].view(DTYPES[self.dtype]).reshape(self.shape)


@functools.lru_cache(maxsize=256)
def _map(file: pathlib.Path) -> np.ndarray:
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def read_header(file: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, and the SHA-256 of its header.

    Raises:
      Damaged: it is no safetensors file, cut off, or its header says what cannot be.
    """
    try:
        size = os.stat(file).st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise Damaged(f"{file} is no safetensors file, or cut off: its header would take {length} bytes")
            text = opened.read(length)
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        found = {name: _tensor(name, facts, file, 8 + length) for name, facts in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file} is damaged: its header is not that of a safetensors file ({error})") from None
    at = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != at:
            raise Damaged(f"{file} is damaged: tensor {tensor.name!r} does not begin where the one before it ends")
        at = tensor.end
    if at != size:
        what = "cut off" if at > size else "longer than its tensors"
        raise Damaged(f"{file} is damaged: it is {what} ({size:,} bytes, its header says {at:,})")
    return found, hashlib.sha256(text).hexdigest()


def _tensor(name: str, facts: dict[str, Any], file: pathlib.Path, base: int) -> Tensor:
    dtype, shape, (first, last) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"shape or offsets of {name!r}")
    if dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != last - first:
        raise ValueError(f"{name!r} of shape {list(shape)} and dtype {dtype} has {last - first} bytes")
    return Tensor(name, file, str(dtype), shape, base + first, base + last)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The tensors of a folder.

    Attributes:
      tensors: by name.
      files: name, bytes and SHA-256 of the header, for whoever wants to know what was read.
    """

    path: pathlib.Path
    tensors: dict[str, Tensor]
    files: list[dict[str, Any]]

    @classmethod
    def of(cls, path: pathlib.Path) -> Folder:
        """Reads headers alone.

        Raises:
          UserError: there is no safetensors file, or one of the index is not there, or damaged.
        """
        index = path / INDEX
        if index.is_file():
            names = _indexed(index)
        elif (path / ONE).is_file():
            names = {ONE: None}
        else:
            pickled = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
            more = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
            raise UserError(f"{path} holds neither {ONE} nor {INDEX}{more}")
        tensors: dict[str, Tensor] = {}
        listed = []
        for name, wanted in names.items():
            file = path / name
            if not file.is_file():
                raise UserError(f"{index} names {name}, which is not there")
            found, digest = read_header(file)
            missing = sorted((wanted or set()) - found.keys())
            if missing:
                raise UserError(f"{index} says that {name} holds {missing[0]!r}, which it does not")
            unnamed = sorted(found.keys() - wanted) if wanted is not None else []
            if unnamed:
                raise UserError(f"{name} holds {unnamed[0]!r}, which {index} does not name")
            tensors |= found
            listed.append({"name": name, "bytes": file.stat().st_size, "header_sha256": digest})
        return cls(path, tensors, listed)


def _indexed(index: pathlib.Path) -> dict[str, set[str]]:
    """File to the tensors that the index says are in it."""
    found: dict[str, set[str]] = {}
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise Damaged(f"{index} is damaged (no object 'weight_map')")
    for tensor, name in places.items():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise Damaged(f"{index} is damaged: {name!r} is not the name of a file beside it")
        found.setdefault(name, set()).add(tensor)
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Made:
    """A tensor to be written: `make` gives its array when it is its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


def write(folder: pathlib.Path, tensors: Iterable[Made], largest: int, wrote: Callable[[int], None]) -> None:
    """Writes tensors to files of at most `largest` bytes of data (or one tensor), with an index where they are several.

    One tensor is in memory at a time.

    Args:
      folder: is there.
      wrote: told the bytes of each tensor.
    """
    shards: list[list[Made]] = []
    for tensor in tensors:
        if not shards or sum(t.bytes for t in shards[-1]) + tensor.bytes > largest:
            shards.append([])
        shards[-1].append(tensor)
    name = lambda i: ONE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    for i, shard in enumerate(shards):
        _write_file(folder / name(i), shard, wrote)
    if len(shards) > 1:
        total = sum(tensor.bytes for shard in shards for tensor in shard)
        places = {tensor.name: name(i) for i, shard in enumerate(shards) for tensor in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _write_file(file: pathlib.Path, tensors: list[Made], wrote: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which readers of PyTorch ask for
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.bytes]
        }  # fmt: skip
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.asarray(tensor.make(), order="C")
            assert array.shape == tensor.shape and array.dtype == DTYPES[tensor.dtype], tensor.name
            out.write(array.view(np.uint8).data if array.ndim else array.tobytes())
            wrote(tensor.bytes)
        out.flush()
        os.fsync(out.fileno())
