"""The forward kernel: a grid step is a segment of a row for some heads, whose W and S stay in fast memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat, tuning
from kernels_pallas.neural_memory import plan, windows
from kernels_pallas.neural_memory.call import Call
from kernels_pallas.neural_memory.cost import forward_cost
from kernels_pallas.neural_memory.group import F32, Group, coefficients

NAME = "neural_memory_forward"


class _Arrays:
    """The arrays of a grid step, and what is done with a group of it."""

    def __init__(self, refs: tuple[Any, ...], call: Call, heads: int, save: bool):
        refs, depth = list(refs), call.depth
        take = lambda n: [refs.pop(0) for _ in range(n)]
        self.call, self.heads = call, heads
        self.starts, self.kinds, self.firsts = take(3)
        self.blocks, self.later, self.gates, self.gates_ = take(3), take(3), *take(2)  # of q, k, v
        self.initial, self.carried, (self.y,) = take(depth), take(depth * call.carried), take(1)
        self.ends, self.before, self.saved = take(depth), take(depth), take(depth * save)
        self.state, self.copies = take(depth), take(depth * (call.dtype != "float32"))
        self.windows, self.window_y, self.window_g, self.semaphores, self.semaphore = take(3), *take(4)
        self.b, self.segment = pl.program_id(0), pl.program_id(2)
        self.own = pl.ds(pl.program_id(1) * heads, heads)

    def renew(self, sources: list[Any], row: Any) -> None:
        """W and S from the main memory."""
        windows.copied(
            self.semaphore, [(source.at[row, self.own], state) for source, state in zip(sources, self.state)]
        )
        for copy, state in zip(self.copies, self.state):
            copy[...] = state[...].astype(self.call.dtype)

    def open_segment(self) -> None:
        """Rows into the windows: the segment, then R behind it; outputs of groups that began before."""
        R, G = self.call.rows, self.call.segment
        for h in range(self.heads):
            for window, block, later in zip(self.windows, self.blocks, self.later):
                window[h, :G] = windows.of_heads(self.call, block, h).astype(F32)
                window[h, G:] = windows.of_heads(self.call, later, h).astype(F32)
            self.window_y[h, :R] = self.window_y[h, G:]
        self.window_g[:G], self.window_g[G:] = self.gates[0, 0], self.gates_[0, 0]

    def keep(self, where: Any, targets: list[Any], at: tuple[Any, ...], number: int) -> Any:
        """Starts copies of W and S to the main memory; what is returned waits for them, before they are written."""
        copies = [
            pltpu.make_async_copy(state, target.at[(*at, self.own)], self.semaphores.at[number, n])
            for n, (state, target) in enumerate(zip(self.state, targets))
        ]

        @pl.when(where)
        def _():
            for copy in copies:
                copy.start()

        def wait() -> None:
            for copy in copies:
                copy.wait()

        return lambda: pl.when(where)(wait)

    def group(self, n: jax.Array) -> None:
        """Outputs of a group, and W and S after it."""
        call, R, G, kind = self.call, self.call.rows, self.call.segment, self.kinds[0, 0, n]
        first, end = self.starts[0, 0, n], self.starts[0, 0, n + 1]
        offset, taken = first - self.segment * G, end - first
        continues = kind == plan.CONTINUES
        pl.when(~continues)(lambda: self.renew(self.initial, lax.rem(self.b, self.initial[0].shape[0])))
        waits = [self.keep(n == self.firsts[0, 0, call.segments] - 1, self.before, (self.b,), 0)]
        if self.saved:
            crosses = (n == 0) | (lax.div(end - 1, G) != lax.div(first - 1, G))
            waits.append(self.keep(crosses & continues, self.saved, (self.b, lax.div(end - 1, G)), 1))
        columns, begin, opens = windows.group_gates(call, self.window_g, offset, taken, first)
        here = lax.broadcasted_iota(jnp.int32, (R, 1), 0) < taken
        q, k, v = ([jnp.where(here, w[h, pl.ds(offset, R)], 0) for h in range(self.heads)] for w in self.windows)
        read = lambda ref, h: lambda: ref[h]
        weights = [[read(ref, h) for ref in self.copies or self.state] for h in range(self.heads)]
        several, own = (kind == plan.SEVERAL).astype(F32), coefficients(call, columns, begin, taken)
        at = Group(call, weights, q, k, v, own, several, opens, jnp.dtype(call.dtype), call.narrow())
        for h, out in enumerate(at.outputs()):
            self.window_y[h, pl.ds(offset, R)] = out
        for wait in waits:
            wait()
        for layer, state in enumerate(self.state):
            for h in range(self.heads):
                new = at.after(h, layer, state[h])
                state[h] = new
                if self.copies:
                    self.copies[layer][h] = new.astype(call.dtype)

    def close_segment(self) -> None:
        for h in range(self.heads):
            windows.put_heads(self.call, self.y, h, self.window_y[h, : self.call.segment])

    def close_row(self) -> None:
        windows.copied(self.semaphore, [(state, end.at[self.b, self.own]) for state, end in zip(self.state, self.ends)])


def _kernel(*refs: Any, call: Call, heads: int, save: bool) -> None:
    at = _Arrays(refs, call, heads, save)
    if call.carried:
        pl.when(at.segment == 0)(lambda: at.renew(at.carried, at.b))
    at.open_segment()
    groups = at.firsts[0, 0, at.segment], at.firsts[0, 0, at.segment + 1]
    lax.fori_loop(*groups, lambda n, carry: (at.group(n), carry)[1], 0)
    at.close_segment()
    pl.when(at.segment == call.segments - 1)(at.close_row)


def run(call: Call, q, k, v, gates, groups, initial, carried, *, heads: int, save: bool):
    """y, and of every layer [W S] at the end, before the last group, and before each segment if they are saved.

    Args:
      q, k, v: as `windows.laid_out` gives them; gates: [B, H / hb, length, 3 hb + 1].
      groups: starts [B, 1, N + 1], kinds [B, 1, N], first groups of segments [B, 1, segments + 1].
      initial, carried: [1 or B, H, i, o] and [B, H, i, o] per layer.
    """
    R, G, depth, S = call.rows, call.segment, call.depth, call.segments
    after = call.length // R - 1  # the last block of R rows
    beyond = lambda i: jnp.minimum((i + 1) * (G // R), after)
    here = lambda i: i
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    lanes = gates.shape[-1]
    block = lambda rows, index: windows.rows_block(call, heads, rows, index)
    in_specs = [
        *(windows.row_scalars(x.shape[-1]) for x in groups),
        *[block(G, here)] * 3, *[block(R, beyond)] * 3,
        windows.gates_block(lanes, G, here), windows.gates_block(lanes, R, beyond),
        *[anywhere] * (depth * (1 + call.carried)),
    ]  # fmt: skip
    shapes = [(call.heads, *s) for s in call.shapes()]
    whole = [jax.ShapeDtypeStruct((call.batch, *s), F32) for s in shapes]
    kept = [jax.ShapeDtypeStruct((call.batch, S, *s), F32) for s in shapes] if save else []
    wide = pltpu.VMEM((heads, G + R, call.widths[0]), F32)
    scratch = [pltpu.VMEM((heads, *s), F32) for s in call.shapes()]
    if call.dtype != "float32":
        scratch += [pltpu.VMEM((heads, *s), call.dtype) for s in call.shapes()]
    scratch += [wide] * 4 + [pltpu.VMEM((G + R, lanes), F32)]
    scratch += [pltpu.SemaphoreType.DMA((2, depth)), pltpu.SemaphoreType.DMA(())]
    with jax.named_scope("neural_memory"):  # else the kernel's own name gets those of jax's transformations
        out = pl.pallas_call(
            functools.partial(_kernel, call=call, heads=heads, save=save),
            out_shape=[windows.shape_of(call, q.dtype), *whole, *whole, *kept],
            grid=(call.batch, call.heads // heads, S),
            in_specs=in_specs,
            out_specs=[block(G, here), *[anywhere] * (depth * (2 + save))],
            scratch_shapes=scratch,
            compiler_params=compat.tpu_params(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=tuning.vmem_limit(call.kind),
                disable_bounds_checks=True,
            ),
            cost_estimate=forward_cost(call, heads, save),
            interpret=call.interpret,
            name=NAME,
        )(*groups, q, k, v, q, k, v, gates, gates, *initial, *carried)
    y, states = out[0], out[1:]
    return y, states[:depth], states[depth : 2 * depth], states[2 * depth :]
