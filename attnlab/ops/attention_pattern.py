"""Masks that are more than an interval, as our kernels take them (`kernels_pallas.flash_attention.Pattern`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.mask_tiles import EMPTY, tile_kinds, tile_words
from attnlab.ops.masks import NEVER, Mask, by_head, numpy_if

# Rows and keys of a tile, the finest first. Of a mask that is known the one with the least work is taken; else the
# first whose lists scalar memory holds, from 512 on where no runs of keys are said to be shorter.
TILES = (256, 256), (512, 512), (1024, 512)
_LIST_BYTES = 640 * 2**10  # of the 1 MiB of scalar memory
_HOPPER_LIST_BYTES = 2**30  # of a kernel's lists, which stand in the GPU's memory
_START = 80 * 2**10  # scores that a tile costs as much as besides its own: docs/kernels.md, tiles of 256 and 512
_WORD = 32  # groups of a tile that a row's word has bits for


def unsupported(spec: AttentionSpec, platform: str) -> str | None:
    """Why the kernels of a platform, "tpu" or "cuda", cannot serve the mask, or None."""
    if spec.groups == "many":
        return f"more than {_WORD} groups of keys in no promised order (Groups.size)"
    if platform == "cuda":
        tile, most = _hopper()
        if spec.axes > most:
            return f"on GPUs it serves masks of at most {most} coordinates of keys, not {spec.axes}"
        if _list_bytes(spec.queries, spec.keys, tile, spec.pattern) > _HOPPER_LIST_BYTES:
            many = f"{spec.pattern} masks over {spec.queries} x {spec.keys}"
            return f"lists of tiles of {many} take more than {_HOPPER_LIST_BYTES >> 20} MiB"
        return None
    if min(_list_bytes(spec.queries, spec.keys, tile, spec.pattern) for tile in TILES) > _LIST_BYTES:
        return f"scalar memory does not hold lists of tiles of {spec.pattern} masks over {spec.queries} x {spec.keys}"
    return None


def _list_bytes(queries: int, keys: int, tile: tuple[int, int], lists: int, most: int | None = None) -> int:
    rows, keys = -(-queries // tile[0]), -(-keys // tile[1])
    return 4 * lists * rows * (1 + (keys if most is None else most))


def _hopper() -> tuple[tuple[int, int], int]:
    """Rows and keys of a tile, and how many coordinates of keys the kernels take."""
    from kernels_pallas.flash_attention import GPU_MOST_AXES, GPU_TILE

    return GPU_TILE, GPU_MOST_AXES


def tile_of(mask: Mask, queries: int, keys: int, platform: str = "tpu") -> tuple[tuple[int, int], Any]:
    """Rows and keys of the tiles, and the tiles' kinds."""
    if platform == "cuda":
        tile, _ = _hopper()
        return tile, tile_kinds(mask, queries, keys, *tile)
    known, best = mask.known(), None
    short = any(term.groups is not None and (term.groups.size or 512) < 512 for term in mask.terms())
    for tile in TILES if known or short else TILES[1:]:
        kinds = tile_kinds(mask, queries, keys, *tile)
        most = int((kinds != EMPTY).sum(-1).max(initial=1)) if known else None
        if _list_bytes(queries, keys, tile, kinds.shape[0] * kinds.shape[1], most) > _LIST_BYTES:
            continue
        if not known:
            return tile, kinds
        work = float((kinds != EMPTY).sum()) * (tile[0] * tile[1] + _START)
        if best is None or work < best[0]:
            best = work, tile, kinds
    assert best is not None, "`unsupported` lets through what some tiles serve"
    return best[1:]


def pattern_of(mask: Mask, queries: int, keys: int, platform: str = "tpu") -> tuple[Any, jax.Array | bool]:
    """The pattern for the kernels of a platform, "tpu" or "cuda", and whether it is the mask: not where more than 32
    groups of keys meet in a tile, which runs of keys that documents cut short may."""
    from kernels_pallas.flash_attention import Pattern

    tile, kinds = tile_of(mask, queries, keys, platform)
    xp = numpy_if(mask.known())
    most = kinds.shape[-1] if xp is jnp else int((kinds != EMPTY).sum(-1).max(initial=1))
    terms, right = zip(*(_term(term, queries, keys, tile[1]) for term in mask.terms()))
    exact = True
    for ok in right:
        exact = exact & ok
    to_device = lambda x: jnp.asarray(x)
    return Pattern(to_device(kinds), jax.tree.map(to_device, terms), max(most, 1), tile), exact


def _term(term: Mask, queries: int, keys: int, width: int) -> tuple[Any, Any]:
    """One term, and whether its words hold all its groups."""
    from kernels_pallas.flash_attention import Term

    xp = numpy_if(term.known())
    bounds = [*map(by_head, term.interval(queries, keys))]
    for axis in term.axes:
        bounds.append(xp.full((1, 1, queries), -NEVER, xp.int32) if axis.lo is None else by_head(axis.lo))
        bounds.append(xp.full((1, 1, queries), NEVER, xp.int32) if axis.hi is None else by_head(axis.hi))
    stacked = _side_by_side(bounds, xp)
    coordinates = _side_by_side([by_head(axis.key) for axis in term.axes], xp) if term.axes else None
    if term.groups is None:
        return Term(stacked, coordinates), True
    group = term.groups.known_group()
    tiles = xp.pad(group, ((0, 0), (0, 0), (0, -keys % width)), constant_values=-1)
    tiles = tiles.reshape(*tiles.shape[:2], -1, width)
    first = xp.where(tiles < 0, NEVER, tiles).min(-1, keepdims=True)
    local = xp.where(tiles < 0, -1, tiles - xp.where(first == NEVER, 0, first))
    words = xp.moveaxis(tile_words(term, queries, keys, width), -1, -2)
    fits = local.max() < _WORD
    local = local.reshape(*group.shape[:2], -1)[..., :keys].astype(xp.int32)
    return Term(stacked, coordinates, words, local), bool(fits) if xp is np else fits


def _side_by_side(parts: list[Any], xp: Any) -> Any:
    """[b, h, n] each, as [b, h, parts, n]."""
    b, h = (max(x.shape[axis] for x in parts) for axis in (0, 1))
    return xp.stack([xp.broadcast_to(x, (b, h, x.shape[2])) for x in parts], 2).astype(xp.int32)


def where_exact(exact: Any, kernel: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """What the kernel gives, or the other where the pattern is not the mask; where only a run tells, both compile."""
    if isinstance(exact, bool):
        return kernel() if exact else other()
    return jax.lax.cond(exact, kernel, other)
