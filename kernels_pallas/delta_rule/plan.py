"""Block sizes of the delta rule on TPU, and its kernels' arrays in blocks. `kernels_pallas.linear_recurrence.plan` has
the rest: its `Plan` is this one's, with decays per position or channel and without a column."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jax.experimental import pallas as pl

from kernels_pallas.linear_recurrence import plan as linear
from kernels_pallas.linear_recurrence.plan import Blocks, Plan, Sizes

_CHUNKS = 2  # of a block at most
_SLACK = 4 * 2**20  # bytes of fast memory for the compiler's own


def kernel_name(channels: bool, direction: str) -> str:
    """Of a kernel in a program."""
    return f"delta_rule_{'channels_' * channels}{direction}"


def sizes(
    length: int, heads: int, width: int, value_width: int, itemsize: int, kind: str, channels: bool
) -> Sizes | None:
    """Blocks for these lengths and padded widths; None where no state of a head fits into fast memory."""
    chunk = linear.joined_chunk(length)
    of = lambda count: functools.partial(count, channels=channels)
    needed = (16, of(forward_bytes)), (8, of(backward_bytes))
    return linear.fitting(chunk, _CHUNKS, needed, length, heads, width, value_width, itemsize, kind)


def forward_bytes(heads: int, chunk: int, chunks: int, d: int, e: int, itemsize: int, *, channels: bool) -> int:
    """Of fast memory in the forward: windows in two buffers, the state, and values of all heads at a time."""
    windows = 2 * (chunk * chunks * (2 * d + 2 * e + max(linear.LANES, chunk)) * itemsize + 3 * d * e * 4)
    decays = linear.forward_channels(chunk, chunks, d) if channels else 0
    return heads * (windows + decays + 8 * d * e + 4 * chunk * (chunks * 4 * linear.LANES + d + 4 * e)) + _SLACK


def backward_bytes(heads: int, chunk: int, chunks: int, d: int, e: int, itemsize: int, *, channels: bool) -> int:
    """As `forward_bytes`; the states before each chunk and errors are made again."""
    windows = 2 * (chunk * chunks * (4 * d + 3 * e + max(linear.LANES, chunk)) * itemsize + 3 * d * e * 4)
    made = 4 * (chunks + 2) * d * e + 4 * chunk * chunks * e
    decays = linear.backward_channels(chunk, chunks, d, 3 * itemsize) if channels else 0
    return heads * (windows + made + decays + 4 * chunk * (4 * linear.LANES + 6 * d + 4 * e)) + _SLACK


def forward_flops(plan: Plan) -> int:
    """Of the kernel's products, without those that only spread or add numbers."""
    return plan.flops(*forward_widths(plan.shape, plan.sizes.chunk, plan.channels))


def backward_flops(plan: Plan) -> int:
    chunks = plan.sizes.chunks
    pairs, states = backward_widths(plan.shape, plan.sizes.chunk, plan.channels)
    return plan.flops(pairs, states) + plan.flops(0, 1) * (chunks - 1) // chunks


def forward_widths(shape: tuple[int, ...], chunk: int, channels: bool) -> tuple[int, int]:
    """Width of products over pairs of a chunk, and of states as multiples of d e."""
    *_, d, e = shape
    met = linear.joints(chunk) if channels else 1
    return 2 * d * met + 2 * e + inverse_width(chunk), 3


def backward_widths(shape: tuple[int, ...], chunk: int, channels: bool) -> tuple[int, int]:
    *_, d, e = shape
    met = linear.joints(chunk) if channels else 1
    return 6 * d * met + 6 * e, 7


def inverse_width(chunk: int) -> int:
    """Width of the products that an inverse costs, as if they were of a chunk's pairs: four, and two halves a join."""
    joins = (chunk // 8).bit_length() - 1
    return chunk * (4 + joins)


class DeltaBlocks(Blocks):
    """The arrays of the delta rule."""

    def given(self, arrays: Mapping[str, Any]) -> None:
        """The inputs that both directions begin with."""
        *_, d, e = self.plan.shape
        self.gates(arrays)
        self.input("beta", linear.as_rows(self.plan, arrays["beta"]), self.rows())
        for name, width in (("q", d), ("k", d), ("v", e)):
            self.input(name, arrays[name], self.positions(width))

    def inverse_shape(self) -> tuple[int, ...]:
        """Inverses of a block's chunks lie side by side: each alone could leave lanes empty."""
        (B, _, H, *_), s = self.plan.shape, self.plan.sizes
        return B, H, self.plan.blocks, s.chunk, s.chunks * s.chunk

    def inverses(self) -> pl.BlockSpec:
        s = self.plan.sizes
        shape = (1, self.heads, 1, s.chunk, s.chunks * s.chunk)
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, self.at(n), 0, 0))
