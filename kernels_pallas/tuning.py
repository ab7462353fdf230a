"""Tile sizes of the kernels: a heuristic that always answers, and tables of what was found best per kind of device.

A table is `tables/<kind>/<kernel>.json`: `{"versions": {...}, "default": {field: value}}`. Tables in the folder that
the environment variable `ATTNLAB_KERNEL_TABLES` names, of the same form, go before those here.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator

import jax

LANES = 128
_START = 48  # rows or keys that a tile's start costs as much as
_WIDE, _NARROW = 256, 4 / 3  # side of the matrix units of v6e and TPU7x; what a row costs more in products of less
TABLES = pathlib.Path(__file__).parent / "tables"
OWN_TABLES = "ATTNLAB_KERNEL_TABLES"  # environment variable
# What jax calls a device, and the folder of its tables.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """Tiles of the TPU forward.

    Attributes:
      rows, keys: of a tile; multiples of 128.
      sub_rows, sub_keys: of what is one matrix product; they divide `rows` and `keys`.
      ones: whether the matrix unit adds up the weights of a row, beside `p @ v`, not the vector unit.
    """

    rows: int = 1024
    keys: int = 512
    sub_rows: int = 256
    sub_keys: int = 512
    ones: bool = True


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """Tiles of the TPU backward; as in `ForwardBlocks`."""

    rows: int = 1024
    keys: int = 512
    sub_rows: int = 512
    sub_keys: int = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles of both directions on TPU; None: by `tuning`."""

    forward: ForwardBlocks | None = None
    backward: BackwardBlocks | None = None


_kind: contextvars.ContextVar[str | None] = contextvars.ContextVar("kind", default=None)


@contextlib.contextmanager
def device_kind(kind: str) -> Iterator[None]:
    """What is traced inside is for devices of this kind ("TPU v6e", or a folder's name), which need not be here."""
    token = _kind.set(KINDS.get(kind, kind))
    try:
        yield
    finally:
        _kind.reset(token)


def kind() -> str:
    """Folder of the tables of the device that is traced for; "" where the device is of no known kind."""
    if _kind.get() is not None:
        return _kind.get()
    return KINDS.get(jax.devices()[0].device_kind, "")


def table(kind: str, kernel: str) -> dict:
    """A kind's table for a kernel; empty where there is none.

    Raises ValueError for a folder that is none and a file that is no table.
    """
    own = os.environ.get(OWN_TABLES)
    if own and not pathlib.Path(own).is_dir():
        raise ValueError(f"{OWN_TABLES}={own!r} is no folder; allowed: one with tables, KIND/KERNEL.json in it")
    for folder in (*([pathlib.Path(own)] if own else []), TABLES):
        path = folder / kind / f"{kernel}.json"
        if kind and path.exists():
            return _read(path, path.stat().st_mtime_ns)
    return {}


@functools.cache
def _read(path: pathlib.Path, changed: int) -> dict:
    del changed
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"kernel table {path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'kernel table {path} holds {type(found).__name__}; allowed: {{"default": {{...}}}}')
    return found


def forward_blocks(kind: str, rows: int, keys: int, kernels: str = "flash") -> ForwardBlocks:
    """Tiles for so many rows and keys on devices of a kind; `kernels` is with what the tables' names begin."""
    wanted = _wanted(ForwardBlocks, kind, f"{kernels}_forward")
    return _fitted(_longer(wanted, _tile(rows, wanted.rows, wanted.sub_rows)), rows, keys)


def backward_blocks(kind: str, rows: int, keys: int, kernels: str = "flash") -> BackwardBlocks:
    """As `forward_blocks`."""
    return _fitted(_wanted(BackwardBlocks, kind, f"{kernels}_backward"), rows, keys)


def _wanted(cls, kind: str, kernel: str):
    """The tiles that a table says."""
    fields = table(kind, kernel).get("default", {})
    allowed = {field.name: type(field.default) for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or any(type(value) is not allowed.get(key) for key, value in fields.items()):
        said = ", ".join(f"{name}: {of.__name__}" for name, of in allowed.items())
        raise ValueError(f"table of {kernel} for {kind!r} has default={fields!r}; allowed: {said}")
    wanted = cls(**fields)
    check(wanted)
    return wanted


def routed_rows(kind: str, rows: int, heads: int) -> int:
    """Rows of a tile, for `rows` packed rows of `heads` key heads.

    The last tile of each head is half empty, as a rule, and where attention is causal it is the one that sees most.
    """
    wanted = forward_blocks(kind, 2**20, 2**20)
    sizes = [size for size in range(LANES, wanted.rows + 1, LANES) if size % min(wanted.sub_rows, size) == 0]
    return min(sizes, key=lambda size: (rows + heads * size) * (1 + _START / size))


def routed_blocks(kind: str, rows: int, keys: int) -> Blocks:
    """Tiles of packed rows, in both directions of `rows` rows, over so many keys."""
    fitted = []
    for wanted in (_longer(forward_blocks(kind, 2**20, 2**20), rows), backward_blocks(kind, 2**20, 2**20)):
        wanted = dataclasses.replace(wanted, rows=rows, sub_rows=divisor(rows, wanted.sub_rows))
        keys_ = _tile(keys, wanted.keys, wanted.sub_keys)
        fitted.append(dataclasses.replace(wanted, keys=keys_, sub_keys=divisor(keys_, wanted.sub_keys)))
    return Blocks(*fitted)


def in_tiles(blocks, rows: int, keys: int):
    """Blocks of either direction in tiles of so many rows and keys; parts of products are what they were, or less."""
    parts = divisor(rows, blocks.sub_rows), divisor(keys, blocks.sub_keys)
    return dataclasses.replace(blocks, rows=rows, keys=keys, sub_rows=parts[0], sub_keys=parts[1])


# Bytes of fast memory beside what belongs to keys: row tiles and scratch.
FORWARD_REST = 8 * 2**20
BACKWARD_REST = 12 * 2**20
_VMEM = {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}  # MiB of a core (jax's `pltpu.get_tpu_info`)


def vmem_limit(kind: str) -> int:
    """Bytes of fast memory that a kernel may use on devices of a kind."""
    return _VMEM.get(kind, 64) * 2**20 * 3 // 4


def resident_keys(kind: str, each: int, keys: int, tile: int, rest: int) -> int:
    """How many keys, in whole tiles, stand in fast memory at a time, of `keys` and `each` bytes; in even parts."""
    tiles = -(-keys // tile)
    most = max((vmem_limit(kind) - rest) // (each * tile), 1)
    parts = -(-tiles // most)
    return -(-tiles // parts) * tile


def decode_block(heads: int, slots: int, width: int, itemsize: int) -> int:
    """Slots of a cache that are read at a time, of `heads` key heads, `width` that of keys and values together."""
    wanted = 2 * 2**20 // (heads * width * itemsize) // LANES * LANES
    return min(max(wanted, LANES), 2048, -(-slots // LANES) * LANES)


def decode_splits(kind: str, batch: int) -> int:
    """Parts of a cache's slots: where a device is two cores, and one sequence would keep one."""
    return 2 if kind == "v5p" and batch == 1 else 1


def _longer(wanted: ForwardBlocks, rows: int) -> ForwardBlocks:
    """With more keys where a tile's rows are few: half as many scores take more than half as long."""
    return dataclasses.replace(wanted, keys=2 * wanted.keys) if 2 * rows <= wanted.rows else wanted


def _fitted(wanted, rows: int, keys: int):
    """Smaller tiles where arrays are short: little of the last one is padding."""
    tile_rows = _tile(rows, wanted.rows, wanted.sub_rows)
    tile_keys = _tile(keys, wanted.keys, wanted.sub_keys)
    return dataclasses.replace(
        wanted,
        rows=tile_rows,
        keys=tile_keys,
        sub_rows=divisor(tile_rows, wanted.sub_rows),
        sub_keys=divisor(tile_keys, wanted.sub_keys),
    )


def _tile(length: int, most: int, sub: int) -> int:
    """A multiple of 128 up to `most`, for which padding and the cost of each tile's start are least together.

    `sub`: of its parts at most, which are one product each.
    """

    def cost(size: int) -> float:
        narrow = divisor(size, sub) < min(sub, _WIDE)
        return -(-length // size) * (size + _START) * (_NARROW if narrow else 1)

    return min(range(LANES, most + 1, LANES), key=cost)


def divisor(size: int, most: int) -> int:
    return next(n for n in range(min(size, most), 0, -LANES) if size % n == 0)


def check(blocks) -> None:
    """Raises ValueError for tiles that cannot be."""
    for name in ("rows", "keys"):
        whole, sub = getattr(blocks, name), getattr(blocks, f"sub_{name}")
        if sub < LANES or sub % LANES or whole % sub:
            raise ValueError(
                f"tile {name}={whole}, sub_{name}={sub}; allowed: sub_{name} a multiple of {LANES} that divides {name}"
            )
