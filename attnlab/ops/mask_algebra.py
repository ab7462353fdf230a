"""Masks made of masks: intersection, union, another order of the keys; and where a sequence may be cut.

Shapes: as in `attnlab.ops.masks`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import UserError
from attnlab.ops.masks import Array, Axis, Mask, by_head, numpy_if


def both(a: Mask, b: Mask) -> Mask:
    """What both masks show: intervals intersect, axes stand side by side, and so do the terms of a union.

    Raises UserError where both have groups, or both are unions.
    """
    if a.either is not None and b.either is not None:
        raise UserError("mask: both of two unions would be a union of four terms; allowed: two")
    if b.either is not None:
        a, b = b, a
    if a.either is not None:
        first, second = a.terms()
        return either(both(first, b), both(second, b))
    if a.groups is not None and b.groups is not None:
        raise UserError("mask: both masks have groups; allowed: one of them")
    one = next((m for m, other in ((a, b), (b, a)) if _static_only(other)), None)
    return Mask(
        _join(jnp.maximum, np.maximum, a.k_start, b.k_start),
        _join(jnp.minimum, np.minimum, a.k_end, b.k_end),
        causal=a.causal or b.causal,
        window=min((w for w in (a.window, b.window) if w is not None), default=None),
        # Of packed documents it is still, where the other has no arrays.
        documents=one is not None and one.documents,
        axes=(*a.axes, *b.axes),
        groups=a.groups if b.groups is None else b.groups,
    )


def either(a: Mask, b: Mask) -> Mask:
    """What one of the masks shows, or both. Raises UserError where one of them is a union already."""
    if a.either is not None or b.either is not None:
        raise UserError("mask: a union of three terms is not allowed; allowed: two")
    a, b = (dataclasses.replace(term, documents=False) for term in (a, b))
    return dataclasses.replace(a, either=b)


def permuted(mask: Mask, order_BS: Array) -> Mask:
    """The mask of the same keys in another order: key s is what key `order_BS[b, s]` was.

    Raises UserError where an interval of keys says more than "all": in another order it would not be one.
    """
    xp = numpy_if(mask.known() and isinstance(order_BS, np.ndarray))

    def moved(keys: Array) -> Array:
        order = order_BS[:, None]
        keys = by_head(keys)
        batch = max(keys.shape[0], order.shape[0])
        wide = lambda x: xp.broadcast_to(x, (batch, keys.shape[1], x.shape[2]))
        return xp.take_along_axis(wide(keys), wide(order), axis=2)

    terms = []
    for term in mask.terms():
        if term.dynamic() or term.causal or term.window is not None:
            raise UserError("mask: intervals of keys are not intervals in another order; allowed: axes and groups")
        axes = tuple(dataclasses.replace(axis, key=moved(axis.key)) for axis in term.axes)
        groups = term.groups
        if groups is not None:
            groups = dataclasses.replace(groups, group=moved(groups.group), size=None)
        terms.append(dataclasses.replace(term, axes=axes, groups=groups))
    return terms[0] if len(terms) == 1 else either(*terms)


def reordered(mask: Mask, order: np.ndarray) -> Mask:
    """The mask of rows and keys both in another order, int [T]: position i is what position `order[i]` was.

    An interval of keys that says more than "all" becomes an axis. Raises UserError where there are groups.
    """
    taken = lambda x: None if x is None else x[..., order]
    terms = []
    for term in mask.terms():
        if term.groups is not None:
            raise UserError("mask: groups of rows are none in another order; allowed: intervals and axes")
        axes = term.axes
        if term.dynamic() or term.causal or term.window is not None:
            bounds = term.interval(len(order), len(order))
            axes = (Axis(np.arange(len(order), dtype=np.int32)[None], *bounds, name="index"), *axes)
        terms.append(Mask(axes=tuple(Axis(taken(a.key), taken(a.lo), taken(a.hi), a.name) for a in axes)))
    return terms[0] if len(terms) == 1 else either(*terms)


def closed_cuts(mask: Mask, length: int) -> Array:
    """Where whole rows may be cut, bool `[B, T + 1]`: before p, where no row before p sees a key at or after it.

    By the intervals of keys alone (`Mask.reach`): where others narrow them it may say no where yes would be right.
    """
    xp = numpy_if(mask.known())
    reach = mask.reach(length, length)
    so_far = np.maximum.accumulate(reach, axis=1) if xp is np else jax.lax.cummax(reach, axis=1)
    so_far = xp.pad(so_far, ((0, 0), (1, 0)))
    return so_far <= xp.arange(length + 1, dtype=xp.int32)


def packed_bits(sees: Array) -> Array:
    """Rows of groups that are seen, bool `[..., N]`, as the bits of `Groups`: uint32 `[..., W]`."""
    xp = numpy_if(isinstance(sees, np.ndarray))
    N = sees.shape[-1]
    sees = xp.pad(sees, [(0, 0)] * (sees.ndim - 1) + [(0, -N % 32)])
    sees = sees.reshape(*sees.shape[:-1], -1, 32).astype(xp.uint32)
    return (sees << xp.arange(32, dtype=xp.uint32)).sum(-1, dtype=xp.uint32)


def _static_only(mask: Mask) -> bool:
    return mask.plain() and not mask.dynamic()


def _join(traced, known, a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return (known if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else traced)(a, b)
