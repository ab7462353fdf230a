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


def _kernel(*refs: Any, call: Call, heads: int, save: bool) -> None:
    refs, depth, R, G = list(refs), call.depth, call.rows, call.segment
    take = lambda n: [refs.pop(0) for _ in range(n)]
    starts, kinds, firsts, *qkv, gates, gates_ = take(11)
    initial, carried = take(depth), take(depth * call.carried)
    (y,) = take(1)
    ends, before, saved = take(depth), take(depth), take(depth * save)
    state, copies = take(depth), take(depth * (call.dtype != "float32"))
    wq, wk, wv, wy, wg, semaphores = refs
    b, h0, i = pl.program_id(0), pl.program_id(1) * heads, pl.program_id(2)
    total = firsts[0, 0, call.segments]
    operands = copies or state

    def copy(source: Any, target: Any) -> None:
        pltpu.sync_copy(source, target)

    def renew(sources: list[Any], row: Any) -> None:
        """W and S from the main memory."""
        for layer in range(depth):
            copy(sources[layer].at[row, pl.ds(h0, heads)], state[layer])
            if copies:
                copies[layer][...] = state[layer][...].astype(call.dtype)

    if call.carried:
        pl.when(i == 0)(lambda: renew(carried, b))

    for h in range(heads):
        for window, here, beyond in zip((wq, wk, wv), qkv[:3], qkv[3:]):
            window[h, :G] = windows.of_heads(call, here, h).astype(F32)
            window[h, G:] = windows.of_heads(call, beyond, h).astype(F32)
        wy[h, :R] = wy[h, G:]  # of groups that began before
    wg[:G], wg[G:] = gates[0, 0], gates_[0, 0]

    def keep(where: Any, targets: list[Any], row: Any, number: int) -> list[Any]:
        """Starts the copies of W and S to the main memory, which may go on until they are written."""
        going = [
            pltpu.make_async_copy(state[n], targets[n].at[row + (pl.ds(h0, heads),)], semaphores.at[number, n])
            for n in range(depth)
        ]
        pl.when(where)(lambda: [c.start() for c in going] and None)
        return going

    def group(n: jax.Array, _: int) -> int:
        first, end, kind = starts[0, 0, n], starts[0, 0, n + 1], kinds[0, 0, n]
        offset, taken = first - i * G, end - first
        pl.when(kind != plan.CONTINUES)(lambda: renew(initial, lax.rem(b, initial[0].shape[0])))
        is_last = n == total - 1
        copying = [(is_last, keep(is_last, before, (b,), 0))]
        if save:
            crosses = (n == 0) | (lax.div(end - 1, G) != lax.div(first - 1, G))
            crosses &= kind == plan.CONTINUES
            copying.append((crosses, keep(crosses, saved, (b, lax.div(end - 1, G)), 1)))
        columns, begin, opens = windows.group_gates(call, wg, offset, taken, first)
        here = lax.broadcasted_iota(jnp.int32, (R, 1), 0) < taken
        rows = lambda w: [jnp.where(here, w[h, pl.ds(offset, R)], 0) for h in range(heads)]
        read = lambda ref, h: lambda: ref[h]
        weights = [[read(ref, h) for ref in operands] for h in range(heads)]
        several = (kind == plan.SEVERAL).astype(F32)
        own = coefficients(call, columns, begin, taken)
        at = Group(
            call, weights, rows(wq), rows(wk), rows(wv), own, several, opens, jnp.dtype(call.dtype), call.narrow()
        )
        for h, out in enumerate(at.outputs()):
            wy[h, pl.ds(offset, R)] = out
        for where, going in copying:
            pl.when(where)(functools.partial(lambda going: [c.wait() for c in going] and None, going))
        for layer in range(depth):
            for h in range(heads):
                new = at.after(h, layer, state[layer][h])
                state[layer][h] = new
                if copies:
                    copies[layer][h] = new.astype(call.dtype)
        return 0

    lax.fori_loop(firsts[0, 0, i], firsts[0, 0, i + 1], group, 0)
    for h in range(heads):
        windows.put_heads(call, y, h, wy[h, :G])

    @pl.when(i == call.segments - 1)
    def _():
        for layer in range(depth):
            copy(state[layer], ends[layer].at[b, pl.ds(h0, heads)])


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
    scratch += [wide] * 4 + [pltpu.VMEM((G + R, lanes), F32), pltpu.SemaphoreType.DMA((2, depth))]
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
