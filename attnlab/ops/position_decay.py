"""What passes from one position of a chunk to another where each position has a decay, with all digits.

The log of it is a difference of sums from the chunk's beginning: at a sum of 100 it is only known to 1e-5 in float32.
So each log is split in two. Of the first parts, multiples of 1/256, sums and differences are exact up to 65,536; the
rests are small, and so are their sums and what those lose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_GRID = 256.0  # parts of one; a power of two


def decays_between(log_decay_C: jax.Array, seen_CC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of logs up to each position, and `exp(g_{i+1} + ... + g_t)` of the pairs that are seen, 0 of the others.

    Args:
      log_decay_C: g [..., C], float32 or wider, 0 or less, finite.
      seen_CC: bool, [C, C] or [..., C, C]: whether i precedes or is t and is of its document. Sums begin anew with a
        document, whose bits no other then changes.

    Returns:
      [..., C] and, t the row and i the column, [..., C, C].
    """
    exact = jnp.round(log_decay_C * _GRID) / _GRID  # of derivative 0: the rest has the gradient
    upto = lambda log: jnp.sum(jnp.where(seen_CC, log[..., None, :], 0), axis=-1)
    high, low = upto(exact), upto(log_decay_C - exact)
    pairs = lambda total: total[..., :, None] - total[..., None, :]
    # What is not seen is replaced before exp too: exp of a large difference would be inf, and its gradient NaN.
    between = jnp.where(seen_CC, pairs(high) + pairs(low), 0)
    return high + low, jnp.where(seen_CC, jnp.exp(between), 0)
