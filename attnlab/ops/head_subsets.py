"""Some of the heads of [B, T, H, e], by static indices."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def take_heads(x_BTHd: jax.Array, heads) -> jax.Array:
    """x[:, :, heads] for static heads, as slices of runs: their transpose is a padding, not a scatter."""
    if list(heads) == list(range(x_BTHd.shape[2])):
        return x_BTHd
    runs: list[list[int]] = []
    for h in heads:
        if runs and h == runs[-1][1]:
            runs[-1][1] = h + 1
        else:
            runs.append([h, h + 1])
    return jnp.concatenate([x_BTHd[:, :, a:b] for a, b in runs], axis=2)


def interleaved(a_BTHe: jax.Array, b_BTHe: jax.Array, a_heads: tuple[int, ...], b_heads: tuple[int, ...]) -> jax.Array:
    """One array [B, T, H, e] of the heads `a_heads` and `b_heads`, which together are 0 to H - 1."""
    order = [*a_heads, *b_heads]
    return take_heads(jnp.concatenate([a_BTHe, b_BTHe], axis=2), [order.index(h) for h in range(len(order))])


def spread(x_BTEd: jax.Array, heads: tuple[int, ...], H: int) -> jax.Array:
    """x at its `heads` of H, zeros elsewhere."""
    others = tuple(h for h in range(H) if h not in heads)
    if not others:
        return x_BTEd
    B, T, _, d = x_BTEd.shape
    return interleaved(x_BTEd, jnp.zeros((B, T, len(others), d), x_BTEd.dtype), heads, others)


def spread_by_groups(heads: int, groups: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`count` of `heads` heads, which fill as few of `groups` groups of neighbours as they can; and the others.

    Both ascend. These groups, and heads within the one that is not full, are spread evenly, so that devices which hold
    neighbouring heads have as many of each.
    """
    size = heads // groups
    full, rest = divmod(count, size)
    filled = [g for g in range(groups) if _evenly(g, full + (rest > 0), groups)]
    last = filled[-1] if rest else None
    taken = [h for h in range(heads) if h // size in filled and (h // size != last or _evenly(h % size, rest, size))]
    return tuple(taken), tuple(h for h in range(heads) if h not in taken)


def _evenly(i: int, n: int, of: int) -> bool:
    """Whether the i-th of `of` places is one of n spread evenly."""
    return (i + 1) * n // of > i * n // of
