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
