"""Products of positions between which every channel decays at its own rate, without a quotient of decays.

A weight `exp(g_{j+1} + ... + g_i)` of a pair i > j has to be a product of one of i and one of j, channel by channel,
for all pairs to be a matrix product. It is, around a position between them: blocks of 1, 2, 4, ... positions are joined
two by two, and pairs across a joint meet at the joint, i by the sum up to it from there, j by the sum from it to there.
Both are 0 or less, so that nothing overflows at any decay, and none is a difference, in which digits are lost.
Sub-blocks of 16 positions are made by four products under masks, larger ones exactly.

Source of the sub-blocks: Yang et al. 2024, Gated Linear Attention, arXiv:2312.06635, section 4.3 (secondary chunking).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_SUB = 16


def decayed_products(rows: jax.Array, keys: jax.Array, log_decay: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sum_c rows_ic keys_jc exp(g_{j+1,c} + ... + g_{i,c})` of pairs j <= i, 0 elsewhere.

    Args:
      rows: [..., m, C, d], several for the same keys.
      keys: [..., C, d].
      log_decay: g [..., C, d], 0 or less; -inf: nothing passes.

    Returns:
      The products [..., m, C, C]; sums of g up to each position, itself included, and behind it, both [..., C, d].
    """
    *_, C, d = keys.shape
    size = _padded(C)
    rows, keys, log_decay = (_filled(x, size) for x in (rows, keys[..., None, :, :], log_decay[..., None, :, :]))
    blocks = lambda x, n: x.reshape(*x.shape[:-2], -1, n, d)
    row, col = jnp.arange(_SUB)[:, None], jnp.arange(_SUB)
    found = jnp.where(row == col, jnp.sum(blocks(rows, _SUB) * blocks(keys, _SUB), axis=-1)[..., None], 0)
    upto, behind, n = log_decay[..., None, :], jnp.zeros_like(log_decay)[..., None, :], 1  # [..., blocks, n, d]
    while n < size:
        two = lambda x: (x[..., 0::2, :, :], x[..., 1::2, :, :])
        (upto_1, upto_2), (behind_1, behind_2) = two(upto), two(behind)
        weight = jnp.exp(jnp.concatenate([behind_1, upto_2], axis=-2))
        if n < _SUB:
            weight = blocks(weight.reshape(log_decay.shape), _SUB)
            product = (blocks(rows, _SUB) * weight) @ jnp.swapaxes(blocks(keys, _SUB) * weight, -1, -2)
            across = (row ^ col >= n) & (row ^ col < 2 * n) & (row > col)
            found = jnp.where(across, product, found)
        else:
            second = blocks(rows, n)[..., 1::2, :, :] * weight[..., n:, :]
            first = blocks(keys, n)[..., 0::2, :, :] * weight[..., :n, :]
            found_1, found_2 = two(found)
            below = jnp.concatenate([second @ jnp.swapaxes(first, -1, -2), found_2], axis=-1)
            above = jnp.concatenate([found_1, jnp.zeros_like(found_1)], axis=-1)
            found = jnp.concatenate([above, below], axis=-2)
        upto, behind, n = (
            jnp.concatenate([upto_1, upto_2 + upto_1[..., -1:, :]], axis=-2),
            jnp.concatenate([behind_1 + upto_2[..., -1:, :], behind_2], axis=-2),
            2 * n,
        )
    return found[..., 0, :C, :C], upto[..., 0, 0, :C, :], behind[..., 0, 0, :C, :]


def products_flops(m: int, C: int, d: int) -> int:
    """FLOPs of the matrix products of `decayed_products`."""
    size, n, flops = _padded(C), _SUB, 4 * 2 * m * _padded(C) * _SUB * d
    while n < size:
        flops += m * size * n * d
        n *= 2
    return flops


def _padded(C: int) -> int:
    """The least `_SUB * 2^n` that holds C."""
    return max(_SUB, 1 << (C - 1).bit_length())


def _filled(x: jax.Array, size: int) -> jax.Array:
    """Zeros behind the positions."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])
