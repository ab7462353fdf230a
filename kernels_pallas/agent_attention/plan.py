"""What is static of a call on TPU, block sizes, and the kernels' arrays in blocks. The rest is
`kernels_pallas.linear_recurrence.plan`'s: its `Plan` is this one's, without decays. `m` agents are padded to rows of
whole tiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl

from kernels_pallas.linear_recurrence import plan as linear
from kernels_pallas.linear_recurrence.plan import LANES, Blocks, Plan, Sizes

TILE = 16  # sublanes of bfloat16: agents are padded to a multiple
_HEADS = 16  # of a block at most: one waits for its chain of products while others go on
_CHUNKS = 2
_SLACK = 4 * 2**20  # bytes of fast memory for the compiler's own


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AgentPlan(Plan):
    """What is static of a call.

    Attributes:
      agents: m, of a head.
      shared: whether all sequences have the same agents.
      scale: of logits.
    """

    agents: int = 1
    shared: bool = True
    scale: float = 1.0

    @property
    def rows(self) -> int:
        """Agents with those that pad them."""
        return padded_agents(self.agents)


def padded_agents(agents: int) -> int:
    return -(-agents // TILE) * TILE


def sizes(length: int, heads: int, agents: int, width: int, value_width: int, itemsize: int, kind: str) -> Sizes | None:
    """Blocks for these lengths and padded widths; None where no state of a head fits into fast memory."""
    chunk = min(LANES, -(-length // 16) * 16)
    needed = [(_HEADS, functools.partial(of, padded_agents(agents))) for of in (forward_bytes, backward_bytes)]
    return linear.fitting(chunk, _CHUNKS, needed, length, heads, width, value_width, itemsize, kind)


def forward_bytes(rows: int, heads: int, chunk: int, chunks: int, d: int, e: int, itemsize: int) -> int:
    """Of fast memory in the forward: windows in two buffers, states, and values of all heads at a time."""
    windows = 2 * (2 * chunk * chunks * (d + e) * itemsize + 4 * rows * (d + 3 * e))
    values = 4 * (chunk * (2 * chunk + d + 3 * e) + rows * (8 * chunk + 4 * e))
    return heads * (windows + 4 * rows * 2 * (LANES + e) + values) + 8 * chunk * (chunk + LANES) + _SLACK


def backward_bytes(rows: int, heads: int, chunk: int, chunks: int, d: int, e: int, itemsize: int) -> int:
    """As `forward_bytes`; the states before each chunk are made again."""
    windows = 2 * (chunk * chunks * (4 * d + 3 * e) * itemsize + 4 * rows * (2 * d + 4 * e))
    values = 4 * (chunk * (3 * chunk + 4 * d + 3 * e) + rows * (12 * chunk + 4 * e))
    made = 4 * chunks * rows * (4 * chunk + 2 * LANES + e)
    return heads * (windows + 4 * rows * 2 * (LANES + e + d) + made + values) + 8 * chunk * (chunk + LANES) + _SLACK


def forward_flops(plan: AgentPlan) -> int:
    """Of the kernel's products, padding included."""
    *_, d, e = plan.shape
    C, m = plan.sizes.chunk, plan.rows
    return _flops(plan, 2 * m * d + m * C + m * (C + e) + (C + m) * e)


def backward_flops(plan: AgentPlan) -> int:
    """As `forward_flops`."""
    *_, d, e = plan.shape
    C, m = plan.sizes.chunk, plan.rows
    again = 2 * m * d + m * C + m * e
    pairs = (C + m) * e + 4 * m * C + (C + m) * e
    return _flops(plan, again + pairs + 2 * m * e + 4 * m * d)


def _flops(plan: AgentPlan, each: int) -> int:
    """Of products that take so many multiplications a position."""
    B, _, H, *_ = plan.shape
    return 2 * B * H * plan.blocks * plan.positions * each


class AgentBlocks(Blocks):
    """The arrays of agent attention."""

    plan: AgentPlan

    def given(self, arrays: Mapping[str, Any]) -> None:
        """The inputs that both directions begin with."""
        plan, (*_, d, e) = self.plan, self.plan.shape
        self.documents(arrays)
        index = (lambda b, h, n: (0, h, 0, 0)) if plan.shared else (lambda b, h, n: (b, h, 0, 0))
        self.input("agents", arrays["agents"], pl.BlockSpec((1, self.heads, plan.rows, d), index))
        for name, width in (("q", d), ("k", d), ("v", e)):
            self.input(name, arrays[name], self.positions(width))

    def bytes_moved(self) -> int:
        """Agents of all sequences are fetched again for each."""
        agents = self.inputs["agents"][0]
        again = self.plan.shape[0] - 1 if self.plan.shared and self.grid[1] > 1 else 0
        return super().bytes_moved() + again * agents.size * agents.dtype.itemsize
