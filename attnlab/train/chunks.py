"""Which files of a checkpoint hold the pieces of its arrays that this process reads.

Hosts that write apart write zarr: of each array a directory with `.zarray` and a file `I.J...` per chunk.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

import jax

from attnlab.errors import Damaged
from attnlab.train import digests

_CHUNK = re.compile(r"state/(?P<array>[^/]+)/(?P<index>\d+(\.\d+)*)")


def fetched(directory: pathlib.Path, like: dict[str, Any], bring: Callable[[set[str]], None]) -> set[str]:
    """Has brought what this process reads of a checkpoint that is elsewhere; the names of the files.

    Args:
      directory: where files come to, with its `digests.json`.
      like: of `needed`.
      bring: brings files by their names.

    Raises:
      Damaged: a file that says how arrays lie is not what was written.
    """
    listed = digests.read(directory).keys()
    names = others(listed)
    bring(names)
    if reason := digests.verifying(directory, names=names)():  # before any of them says how arrays lie
        raise Damaged(reason)
    wanted = names | needed(directory, listed, like)
    bring(wanted)
    return wanted


def others(names: Collection[str]) -> set[str]:
    """Files that are no chunks of arrays: small ones, or all where the checkpoint is not of zarr."""
    return {name for name in names if not _chunk(name, names)}


def needed(directory: pathlib.Path, names: Collection[str], like: dict[str, Any]) -> set[str]:
    """Of a checkpoint's files the chunks that lie in this process's pieces of arrays.

    Args:
      directory: of the checkpoint, with the `.zarray` of each array.
      names: of its files.
      like: what is read: trees of ShapeDtypeStructs with shardings, by the names under which they were saved. Of an
        array below these that cannot be told from its name all is needed, of others nothing.
    """
    leaves = jax.tree_util.tree_leaves_with_path(like)
    known = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    ranges: dict[str, list[list[range]]] = {}
    found = set()
    for name in names:
        match = _chunk(name, names)
        if match is None or match["array"].split(".")[0] not in like:
            continue
        array = match["array"]
        if array not in ranges:
            layout = json.loads((directory / "state" / array / ".zarray").read_bytes())
            ranges[array] = _ranges(known.get(array), tuple(layout["shape"]), layout["chunks"])
        index = tuple(map(int, match["index"].split(".")))
        if any(all(i in r for i, r in zip(index, piece)) for piece in ranges[array]):
            found.add(name)
    return found


def _chunk(name: str, names: Collection[str]) -> re.Match[str] | None:
    match = _CHUNK.fullmatch(name)
    return match if match and f"state/{match['array']}/.zarray" in names else None


def _ranges(leaf: jax.ShapeDtypeStruct | None, shape: tuple[int, ...], chunks: list[int]) -> list[list[range]]:
    """Of each of this process's pieces the chunks that it touches, along each axis; a scalar is one chunk, `0`."""
    if leaf is None or leaf.shape != shape:  # whoever restores says so
        return [[range(-(-n // c)) for n, c in zip(shape, chunks)]]
    pieces = leaf.sharding.addressable_devices_indices_map(shape).values()
    bounds = ([s.indices(n) for s, n in zip(piece, shape)] for piece in pieces)
    return [[range(start // c, -(-stop // c)) for (start, stop, _), c in zip(b, chunks)] for b in bounds]
