"""What the kernels cost: FLOPs of their products, and the bytes that move between main and fast memory."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.neural_memory.call import Call


def forward_flops(call: Call) -> float:
    """Matrix products of a row's whole groups, all pairs of a group counted."""
    R, C = call.rows, call.chunk
    total = 0.0
    for index, (i, o) in enumerate(zip(call.widths[:-1], call.widths[1:])):
        reads = 2 * 2 * 2.0 * i * o  # keys and queries, by W and S
        back = 2 * 2.0 * i * o if index else 0.0
        pairs = 2.0 * R * (i + o) + 2.0 * (R - C) / 2 * (i + o) * (2 if index else 1)
        total += reads + back + 2 * 2.0 * i * o + pairs
    return call.batch * call.heads * call.length * (total + 2.0 * R)


def _states(call: Call) -> int:
    """Bytes of [W S] of all rows and heads."""
    return 4 * call.batch * call.heads * sum(i * o for i, o in call.shapes())


def forward_bytes(call: Call, heads: int, save: bool) -> int:
    """What the blocks and copies move; of initial states one for each row."""
    itemsize, positions = jnp.dtype(call.dtype).itemsize, call.batch * call.heads * call.length
    read = positions * (1 + call.rows / call.segment)
    rows = (3 * read + positions) * call.widths[0] * itemsize
    gates = read / heads * (3 * heads + 1) * 4
    return int(rows + gates + _states(call) * (1 + call.carried + 2 + save * call.segments))


def backward_bytes(call: Call, heads: int) -> int:
    """What the blocks and copies move."""
    itemsize, positions = jnp.dtype(call.dtype).itemsize, call.batch * call.heads * call.length
    read = positions * (1 + call.rows / call.segment)
    rows = (4 * read + 3 * positions) * call.widths[0] * itemsize
    gates = (read * (3 * heads + 1) + positions * 3 * heads) / heads * 4
    return int(rows + gates + _states(call) * (call.segments + 1 + 2 + 1 + call.carried))


def forward_cost(call: Call, heads: int, save: bool) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=int(forward_flops(call)), bytes_accessed=forward_bytes(call, heads, save), transcendentals=_curves(call)
    )


def backward_cost(call: Call, heads: int) -> pl.CostEstimate:
    """The forward once more, and two products for each of its own."""
    flops, moved = int(4 * forward_flops(call)), backward_bytes(call, heads)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=2 * _curves(call))


def _curves(call: Call) -> int:
    """Evaluations of tanh and exp2."""
    return call.batch * call.heads * call.length * (2 * sum(call.widths[1:-1]) + 2 * call.rows)
