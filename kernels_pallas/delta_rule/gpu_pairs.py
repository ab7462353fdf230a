"""What of a chunk does not depend on the state, for all chunks at once, on Hopper: one warpgroup makes one chunk's.

P = q k^T, each pair weighted by what is left of it, and (I + N diag(beta))^-1, where N is k k^T below the diagonal,
weighted the same way: the WY or UT transform (Yang et al. 2024, arXiv:2406.06484).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.delta_rule.gpu_chunk import (
    BETA,
    C,
    chunk,
    numbers_memory,
    pair_weights,
    per_column,
    product,
)
from kernels_pallas.hopper import added, put

NAME = "delta_rule_pairs"
_BASE = 8  # blocks of so many rows by a power series: powers of larger ones are huge, and cancel


def pairs(
    device: hopper.Device, q: jax.Array, k: jax.Array, numbers: jax.Array, *, documents: bool
) -> tuple[jax.Array, jax.Array]:
    """The inverses and P, both [B, H, N, C, C] in the dtype of q; for the other arrays see `gpu_chunk`."""
    (B, _, H, d), N = q.shape, numbers.shape[2]
    out = jax.ShapeDtypeStruct((B, H, N, C, C), q.dtype)
    tile = hopper.tiles((C, C), q.dtype)
    run = device.kernel(
        NAME,
        _Pairs(device, documents, q.dtype).body,
        out_type=[out, out],
        scratch_types={
            "q_s": hopper.tiles((C, d), q.dtype), "k_s": hopper.tiles((C, d), q.dtype), "numbers_s": numbers_memory(),
            "p_s": tile, "first_s": tile, "second_s": tile, "here": hopper.barriers(1, 3),
        },
        by_lanes=True,
        grid=(N, H, B),
        grid_names=("n", "h", "b"),
    )  # fmt: skip
    return run(q, k, numbers)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What a launch's code is made from."""

    device: hopper.Device
    documents: bool
    dtype: Any

    def body(self, q, k, numbers, inverses, scores, *, q_s, k_s, numbers_s, p_s, first_s, second_s, here) -> None:
        device = self.device
        n, h, b = (lax.axis_index(name) for name in ("n", "h", "b"))
        plgpu.copy_gmem_to_smem(k.at[b, chunk(n), h], k_s, here.at[0])
        plgpu.copy_gmem_to_smem(q.at[b, chunk(n), h], q_s, here.at[0])
        plgpu.copy_gmem_to_smem(numbers.at[b, h, n], numbers_s, here.at[0])
        plgpu.barrier_wait(here.at[0])
        overlap, scored = product(device, k_s, k_s.T), product(device, q_s, k_s.T)
        weights = pair_weights(device, numbers_s, self.documents)
        put(p_s, scored * weights)
        plgpu.copy_smem_to_gmem(p_s, scores.at[b, h, n])
        below = device.iota((C, C), 0) > device.iota((C, C), 1)
        lower = jnp.where(below, overlap * weights * per_column(device, numbers_s, BETA), 0.0)
        inverse = self.inverse(lower, first_s, second_s)
        put(second_s, inverse)  # the other may still be read, by the last product of another warp
        plgpu.copy_smem_to_gmem(second_s, inverses.at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    def inverse(self, lower: jax.Array, first: Any, second: Any) -> jax.Array:
        """`(I + lower)^-1` [C, C] float32, of a strictly lower triangular matrix; products are of numbers in the dtype.

        Blocks of 8 on the diagonal are `(I - L)(I + L^2)(I + L^4)`, all at once. Neighbours are joined two by two:
        X_21 = -X_22 L_21 X_11. `first` and `second` are memory for operands.
        """
        device = self.device
        row, col = device.iota((C, C), 0), device.iota((C, C), 1)
        within = lambda size: (row ^ col) < size  # of two numbers below C: they are of one block of a power of two
        narrow = lambda x: x.astype(self.dtype)
        diagonal = jnp.where(within(_BASE), lower, 0.0)
        inverse = jnp.where(row == col, 1.0, 0.0) - diagonal
        put(first, diagonal)
        put(second, product(device, first, first))
        inverse = added(device, inverse, (narrow(inverse), second))
        put(first, product(device, second, second))
        inverse = added(device, inverse, (narrow(inverse), first))
        size = _BASE
        while size < C:
            put(second, inverse)
            off = jnp.where(within(2 * size) & ~within(size), lower, 0.0)
            put(first, product(device, narrow(off), second))
            inverse = added(device, inverse, (narrow(-inverse), first))
            size *= 2
        return inverse
