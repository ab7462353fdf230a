"""The backward kernel: segments in reverse, in each the states again from the one that was saved, then its groups."""

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
from kernels_pallas.neural_memory.cost import backward_cost
from kernels_pallas.neural_memory.group import F32, Group, coefficients

NAME = "neural_memory_backward"


class _Arrays:
    """The arrays of a grid step, and what is done with a group of it."""

    def __init__(self, refs: tuple[Any, ...], call: Call, heads: int):
        refs, depth = list(refs), call.depth
        take = lambda n: [refs.pop(0) for _ in range(n)]
        self.call, self.heads = call, heads
        self.starts, self.kinds, self.firsts = take(3)
        self.blocks, self.earlier, self.gates, self.gates_ = take(4), take(4), *take(2)  # of q, k, v, dy
        self.initial, self.saved, self.d_end, self.d_before = take(depth), take(depth), take(depth), take(depth)
        self.d_blocks, self.d_gates, self.d_initial = take(3), *take(1), take(depth)
        self.d_carried = take(depth * call.carried)
        self.store, self.d_state, self.d_begin = take(depth), take(depth), take(depth)
        self.windows, self.window_g, self.d_windows, self.d_window_g = take(4), *take(1), take(3), *take(1)
        (self.semaphore,) = take(1)
        self.b, self.h0 = pl.program_id(0), pl.program_id(1) * heads
        self.segment = call.segments - 1 - pl.program_id(2)
        self.own = pl.ds(self.h0, heads)
        # Slots of `store` behind those of groups: the initial state, and one for a moment.
        self.first_slot, self.spare = call.stores, call.stores + 1

    def copy(self, f: Any, *lists: list[Any]) -> None:
        """Copies of every layer's arrays: f tells source and target."""
        windows.copied(self.semaphore, [f(*arrays) for arrays in zip(*lists, strict=True)])

    def open_row(self) -> None:
        row = lax.rem(self.b, self.initial[0].shape[0])
        self.copy(lambda s, x: (x.at[row, self.own], s.at[self.first_slot]), self.store, self.initial)
        self.copy(lambda g, x: (x.at[self.b, self.own], g), self.d_state, self.d_end)
        for ref in (*self.d_begin, *self.d_windows, self.d_window_g):
            ref[...] = jnp.zeros_like(ref)

    def open_segment(self) -> None:
        """Rows into the windows: R before the segment, then the segment; gradients of its last from the later one."""
        R, G = self.call.rows, self.call.segment
        for window, block, before in zip(self.windows, self.blocks, self.earlier):
            for h in range(self.heads):
                window[h, :R] = windows.of_heads(self.call, before, h).astype(F32)
                window[h, R : R + G] = windows.of_heads(self.call, block, h).astype(F32)
        self.window_g[:R], self.window_g[R : R + G] = self.gates_[0, 0], self.gates[0, 0]
        for ref in self.d_windows:
            ref[:, G : G + R] = ref[:, :R]
            ref[:, :G] = jnp.zeros((ref.shape[0], G, ref.shape[2]), F32)
        self.d_window_g[G : G + R] = self.d_window_g[:R]
        self.d_window_g[:G] = jnp.zeros((G, self.d_window_g.shape[1]), F32)

    def continues(self, n: jax.Array) -> jax.Array:
        return self.kinds[0, 0, n] == plan.CONTINUES

    def base(self, n: jax.Array, slot: jax.Array) -> list[list[jax.Array]]:
        """[W S] before a group, of every head for each layer."""
        slot = jnp.where(self.continues(n), slot, self.first_slot)
        return [[s[slot, h] for s in self.store] for h in range(self.heads)]

    def inputs(self, n: jax.Array) -> tuple[Any, jax.Array, jax.Array, list[list[jax.Array]]]:
        """How to take a group, its first row in the windows, whether rows are of it, and rows of q, k, v, dy, gates."""
        call, R = self.call, self.call.rows
        first, end = self.starts[0, 0, n], self.starts[0, 0, n + 1]
        offset, taken = first - self.segment * call.segment + R, end - first
        gates, begin, opens = windows.group_gates(call, self.window_g, offset, taken, first)
        here = lax.broadcasted_iota(jnp.int32, (R, 1), 0) < taken
        rows = [[jnp.where(here, w[h, pl.ds(offset, R)], 0) for h in range(self.heads)] for w in self.windows]
        several = (self.kinds[0, 0, n] == plan.SEVERAL).astype(F32)

        def group(states, q, k, v, gates):
            weights = [[functools.partial(lambda w: w, w) for w in layers] for layers in states]
            own = coefficients(call, gates, begin, taken)
            return Group(call, weights, q, k, v, own, several, opens, F32, F32)

        return group, offset, here, [*rows, gates]

    def following(self, slot: jax.Array) -> jax.Array:
        """The next slot; positions that cannot be are not to write behind the last."""
        return jnp.minimum(slot + 1, self.call.stores - 1)

    def again(self, n: jax.Array, slot: jax.Array) -> jax.Array:
        """Puts the state after a group into the next slot, if the next group starts from it; the slot filled last."""
        follows = self.continues(n + 1)

        @pl.when(follows)
        def _():
            make, _, _, (q, k, v, _, gates) = self.inputs(n)
            states = self.base(n, slot)
            group = make(states, q, k, v, gates)
            group.learn()
            for layer, store in enumerate(self.store):
                for h in range(self.heads):
                    store[self.following(slot), h] = group.after(h, layer, states[h][layer])

        return jnp.where(follows, self.following(slot), slot)

    def reverse(self, n: jax.Array, slot: jax.Array) -> jax.Array:
        """The gradients of a group; the slot of the one before."""
        depth, call = self.call.depth, self.call
        make, offset, here, (q, k, v, dy, gates) = self.inputs(n)

        def group(states, *rows):
            at = make(states, *rows)
            y = at.outputs()
            return y, [[at.after(h, m, states[h][m]) for m in range(depth)] for h in range(self.heads)]

        _, pull = jax.vjp(group, self.base(n, slot), q, k, v, gates)
        after = [[g[h] for g in self.d_state] for h in range(self.heads)]
        d_states, *d_rows, d_gates = pull((dy, after))
        for ref, rows in zip(self.d_windows, d_rows):
            for h in range(self.heads):
                at = ref.at[h, pl.ds(offset, call.rows)]
                at[...] = jnp.where(here, rows[h], at[...])
        at = self.d_window_g.at[pl.ds(offset, call.rows)]
        at[...] = jnp.where(here, d_gates, at[...])
        for h in range(self.heads):
            for layer in range(depth):
                self.d_state[layer][h] = d_states[h][layer]

        @pl.when(n == self.firsts[0, 0, call.segments] - 1)
        def _():  # what was asked of the state before the row's last group
            self.copy(lambda s, x: (x.at[self.b, self.own], s.at[self.spare]), self.store, self.d_before)
            for g, store in zip(self.d_state, self.store):
                g[...] += store[self.spare]

        follows = self.continues(n)

        @pl.when(jnp.logical_not(follows))
        def _():
            for g, begin in zip(self.d_state, self.d_begin):
                begin[...] += g[...]
                g[...] = jnp.zeros_like(g)

        return jnp.where(follows, slot - 1, slot)

    def close_segment(self) -> None:
        R, G = self.call.rows, self.call.segment
        for block, window in zip(self.d_blocks, self.d_windows):
            for h in range(self.heads):
                windows.put_heads(self.call, block, h, window[h, R : R + G])
        self.d_gates[0, 0] = self.d_window_g[R : R + G]

    def close_row(self) -> None:
        self.copy(lambda x, g: (g, x.at[self.b, self.own]), self.d_initial, self.d_begin)
        if self.call.carried:
            self.copy(lambda x, g: (g, x.at[self.b, self.own]), self.d_carried, self.d_state)


def _kernel(*refs: Any, call: Call, heads: int) -> None:
    at = _Arrays(refs, call, heads)
    step = pl.program_id(2)
    pl.when(step == 0)(at.open_row)
    at.open_segment()
    first, end = at.firsts[0, 0, at.segment], at.firsts[0, 0, at.segment + 1]
    starts_from_saved = (end > first) & at.continues(first)

    @pl.when(starts_from_saved)
    def _():
        saved_at = (at.b, at.segment, at.own)
        at.copy(lambda s, x: (x.at[saved_at], s.at[0]), at.store, at.saved)

    slot = jnp.where(starts_from_saved, 0, -1)
    slot = lax.fori_loop(first, end - 1, at.again, slot)
    lax.fori_loop(0, end - first, lambda n, slot: at.reverse(end - 1 - n, slot), slot)
    at.close_segment()
    pl.when(step == call.segments - 1)(at.close_row)


def run(call: Call, q, k, v, dy, gates, groups, initial, saved, d_end, d_before, *, heads: int):
    """Gradients of q, k, v, gates [B, H / hb, length, 3 hb], of the initial states of every row [B, H, i, o] per layer,
    and of the carried ones, if there are.

    Args: as of `tpu_forward.run`; groups: first groups of segments are those that end there. d_end, d_before: gradients
    of the state at the end and before the last group.
    """
    R, G, depth, S = call.rows, call.segment, call.depth, call.segments
    here = lambda i: S - 1 - i
    before = lambda i: jnp.maximum(here(i) * (G // R) - 1, 0)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    lanes = gates.shape[-1]
    block = lambda rows, index: windows.rows_block(call, heads, rows, index)
    in_specs = [
        *(windows.row_scalars(x.shape[-1]) for x in groups),
        *[block(G, here)] * 4, *[block(R, before)] * 4,
        windows.gates_block(lanes, G, here), windows.gates_block(lanes, R, before),
        *[anywhere] * (4 * depth),
    ]  # fmt: skip
    shapes = call.shapes()
    whole = [jax.ShapeDtypeStruct((call.batch, call.heads, *s), F32) for s in shapes]
    d_gates = jax.ShapeDtypeStruct((*gates.shape[:-1], lanes - 1), F32)
    states = [pltpu.VMEM((heads, *s), F32) for s in shapes]
    rows = R + G + R
    wide = pltpu.VMEM((heads, rows, call.widths[0]), F32)
    scratch = [pltpu.VMEM((call.stores + 2, heads, *s), F32) for s in shapes] + states * 2
    scratch += [wide] * 4 + [pltpu.VMEM((rows, lanes), F32)] + [wide] * 3 + [pltpu.VMEM((rows, lanes - 1), F32)]
    scratch.append(pltpu.SemaphoreType.DMA(()))
    with jax.named_scope("neural_memory"):  # else the kernel's own name gets those of jax's transformations
        out = pl.pallas_call(
            functools.partial(_kernel, call=call, heads=heads),
            out_shape=[*[windows.shape_of(call, q.dtype)] * 3, d_gates, *whole, *whole * call.carried],
            grid=(call.batch, call.heads // heads, S),
            in_specs=in_specs,
            out_specs=[
                *[block(G, here)] * 3,
                windows.gates_block(lanes - 1, G, here),
                *[anywhere] * (depth * (1 + call.carried)),
            ],  # fmt: skip
            scratch_shapes=scratch,
            compiler_params=compat.tpu_params(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=tuning.vmem_limit(call.kind),
                disable_bounds_checks=True,
            ),
            cost_estimate=backward_cost(call, heads),
            interpret=call.interpret,
            name=NAME,
        )(*groups, q, k, v, dy, q, k, v, dy, gates, gates, *initial, *saved, *d_end, *d_before)
    return out[:3], out[3], out[4 : 4 + depth], out[4 + depth :]
