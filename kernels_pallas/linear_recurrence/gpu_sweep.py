"""The kernel for Hopper: one pass over the positions, each computing warpgroup with some columns of a head's state.

The state stays in registers, an accumulator; a copy in the dtype of products goes through shared memory once a chunk.
What a position writes is weighted in its values, not in its keys, so that warpgroups share the tiles of keys and never
meet. The last warpgroup copies chunks to the others.

The backward is this sweep too (`gpu`): against the positions, `reverse`, a query takes what comes after it.

Shapes: B batch, T positions, H heads, d and e widths, C positions of a chunk, N chunks, W computing warpgroups of E
columns. T is a multiple of C, d of 64, e of W E.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.hopper import COLUMNS, LAYOUT, ROWS, by_column, by_row

CHUNK = 64  # C: rows of the tensor cores' tile
UNIT = 64  # of widths


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a block of threads has: computing warpgroups, chunks in flight, and columns of a warpgroup, 32 or 64."""

    warpgroups: int = 2
    stages: int = 2
    columns: int = 64


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a sweep knows of positions beside its arrays.

    Attributes:
      logs: [B or 1, H, N, C] float32, sums of log2 decays over a chunk's positions from where the sweep enters it to
        each; None: nothing decays.
      limits: [B, T] int32, of each position's document the first position, in `reverse` the last; None: all positions
        are of one document. That of the state that the sweep starts from may be another number.
      before: [B] int32, the limit of that document; None as `limits`.
    """

    logs: jax.Array | None = None
    limits: jax.Array | None = None
    before: jax.Array | None = None


def default_blocks(d: int, e: int) -> Blocks:
    """For padded widths, by what compiles without spills; none has been timed."""
    if d <= 128 and (e == UNIT or e % (2 * UNIT) == 0):
        return Blocks(warpgroups=min(e // UNIT, 2))
    return Blocks(columns=32)


def sweep(
    device: hopper.Device,
    name: str,
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    numbers: Numbers,
    state: jax.Array | None,
    against: jax.Array | None,
    *,
    reverse: bool,
    wants_end: bool,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """o [B, T, H, e], the state where the sweep ends [B, H, d, e], and `o . against` [B, H, e / E, T], parts of a sum.

    Args:
      q, k: [B, T, H, d]; u: [B, T, H, e]; against: as u, or None.
      state: [B, H, d, e] float32 from which it starts; None: nothing.
      reverse: from the last position to the first.
      wants_end: whether the state where it ends is asked for.
    """
    (B, T, H, d), e = q.shape, u.shape[3]
    launch = _Sweep(device, blocks, reverse, d, T // CHUNK, q.dtype)
    run = device.kernel(
        name,
        launch.body,
        by_lanes=True,
        out_type=[
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct((B, H, d, e), jnp.float32) if wants_end else None,
            None if against is None else jax.ShapeDtypeStruct((B, H, e // blocks.columns, T), jnp.float32),
        ],
        scratch_types=launch.scratch(numbers, against is not None),
        grid=(e // (blocks.warpgroups * blocks.columns), H, B),
        grid_names=("e", "h", "b"),
        num_threads=blocks.warpgroups + 1,
        thread_name="wg",
    )
    return run(q, k, u, numbers.logs, numbers.limits, numbers.before, state, against, hopper.hidden_zero())


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """What a launch's code is made from."""

    device: hopper.Device
    blocks: Blocks
    reverse: bool
    d: int
    chunks: int
    dtype: Any

    @property
    def last(self) -> int:
        """The position of a chunk at which the sweep leaves it."""
        return 0 if self.reverse else CHUNK - 1

    def scratch(self, numbers: Numbers, against: bool) -> dict[str, Any]:
        stages, W, E = self.blocks.stages, self.blocks.warpgroups, self.blocks.columns
        tiles = lambda *shape: hopper.tiles(shape, self.dtype, E * jnp.dtype(self.dtype).itemsize)
        copies = 3 + against + (numbers.logs is not None) + (numbers.limits is not None)
        return {
            "q_s": tiles(stages, CHUNK, self.d),
            "k_s": tiles(stages, CHUNK, self.d),
            "u_s": tiles(stages, CHUNK, W * E),
            "against_s": tiles(stages, CHUNK, W * E) if against else None,
            "logs_s": None if numbers.logs is None else plgpu.SMEM((stages, CHUNK), jnp.float32),
            "limits_s": None if numbers.limits is None else plgpu.SMEM((stages, CHUNK), jnp.int32),
            "state_s": tiles(W, self.d, E),
            "written_s": tiles(W, CHUNK, E),
            "o_s": tiles(W, CHUNK, E),
            "dots_s": plgpu.SMEM((W, CHUNK), jnp.float32) if against else None,
            "here": hopper.barriers(stages, copies),
            "free": hopper.barriers(stages, W),
        }

    def body(self, q, k, u, logs, limits, before, state, against, zero, o, end, dots, **scratch: Any) -> None:
        e, h, b, wg = (lax.axis_index(name) for name in ("e", "h", "b", "wg"))
        t = types.SimpleNamespace(
            q=q, k=k, u=u, logs=logs, limits=limits, before=before, state=state, against=against, o=o, end=end,
            dots=dots, e=e, h=h, b=b, wg=wg, zero=zero[0], **scratch,
        )  # fmt: skip
        t.part = e * self.blocks.warpgroups + wg
        t.columns = pl.ds(t.part * self.blocks.columns, self.blocks.columns)
        t.slot = lambda i: lax.rem(i, self.blocks.stages)
        t.chunk = (lambda i: self.chunks - 1 - i) if self.reverse else (lambda i: i)
        pl.when(wg < self.blocks.warpgroups)(lambda: self.compute(t))
        pl.when(wg == self.blocks.warpgroups)(lambda: self.copy(t))

    def set_registers(self, which: int, action: str) -> None:
        """Only three warpgroups start with less than they may have."""
        if self.blocks.warpgroups == 2:
            self.device.set_registers(hopper.REGISTERS[which], action=action)

    def copy(self, t: Any) -> None:
        """The last warpgroup: fills the ring of chunks."""
        self.set_registers(1, "decrease")
        all_columns = self.blocks.warpgroups * self.blocks.columns
        columns = pl.ds(t.e * all_columns, all_columns)

        def chunk(i: jax.Array) -> None:
            at, n = t.slot(i), t.chunk(i)
            rows = pl.ds(n * CHUNK, CHUNK)
            fetch = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[at], t.here.at[at])
            fetch(t.q.at[t.b, rows, t.h], t.q_s)
            fetch(t.k.at[t.b, rows, t.h], t.k_s)
            fetch(t.u.at[t.b, rows, t.h, columns], t.u_s)
            if t.against is not None:
                fetch(t.against.at[t.b, rows, t.h, columns], t.against_s)
            if t.logs is not None:
                fetch(t.logs.at[t.b if t.logs.shape[0] > 1 else t.b & 0, t.h, n], t.logs_s)
            if t.limits is not None:
                fetch(t.limits.at[t.b, rows], t.limits_s)

        hopper.fill_ring(self.blocks.stages, self.chunks, t.free, chunk)

    def compute(self, t: Any) -> None:
        """A computing warpgroup: its columns, chunk by chunk."""
        self.set_registers(0, "increase")
        state = self.device.zeros(self.d, self.blocks.columns)
        if t.state is not None:
            state = self.device.load(t.state.at[t.b, t.h, :, t.columns], LAYOUT, optimized=False)
        before = jnp.int32(0) if t.before is None else t.before[t.b]
        state, _ = lax.fori_loop(0, self.chunks, lambda i, carry: self.step(t, i, *carry), (state, before))
        plgpu.wait_smem_to_gmem(0)
        if t.end is not None:
            t.end.at[t.b, t.h, :, t.columns][...] = state

    def step(self, t: Any, i: jax.Array, state: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A chunk: its rows of o, and the state behind it."""
        device, at, wide = self.device, t.slot(i), (CHUNK, self.blocks.columns)
        wg = t.wg + lax.min(i, t.zero)
        mine = pl.ds(t.wg * wide[1], wide[1])
        state_s, written_s = t.state_s.at[wg], t.written_s.at[wg]
        state_s[...] = state.astype(self.dtype)
        plgpu.barrier_wait(t.here.at[at])
        q, k, u = t.q_s.at[at], t.k_s.at[at], t.u_s.at[at, :, mine]
        read, write, carry, last = self.weights(t, at, before)
        written = device.load(u, LAYOUT)
        if write is not None:
            written = (written.astype(jnp.float32) * by_row(write, wide)).astype(self.dtype)
        written_s[...] = written
        plgpu.commit_smem()

        def pairs(scores: Any) -> jax.Array:
            device.wgmma(scores, q, k.T)
            return device.read(scores)

        def from_state(far: Any) -> jax.Array:
            device.wgmma(far, q, state_s)
            return device.read(far)

        scores = self.weighted(t, i, device.scoped(pairs, (CHUNK, CHUNK))).astype(self.dtype)
        o = device.scoped(from_state, wide)
        if read is not None:
            o = o * by_row(read, wide)
        o = device.state(lambda o: device.wgmma(o, scores, u))(device.start(o))
        state = state if carry is None else state * carry
        state = device.state(lambda s: device.wgmma(s, k.T, written_s))(device.start(state))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if t.against is not None:
            against = device.load(t.against_s.at[at, :, mine], LAYOUT).astype(jnp.float32)
            t.dots_s.at[wg][...] = (o * against).sum(axis=1)
        t.o_s.at[wg][...] = o.astype(self.dtype)
        plgpu.commit_smem()  # also puts plain reads of the ring before the copies that overwrite it
        plgpu.barrier_arrive(t.free.at[at])
        rows = pl.ds(t.chunk(i) * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(t.o_s.at[wg], t.o.at[t.b, rows, t.h, t.columns])
        if t.against is not None:
            plgpu.copy_smem_to_gmem(t.dots_s.at[wg], t.dots.at[t.b, t.h, t.part, rows])
        return state, last

    def weights(self, t: Any, at: jax.Array, before: jax.Array) -> tuple[Any, ...]:
        """How much a position reads of the state before the chunk [C], how much of it is in the state behind [C], how
        much of the state before is; each None for all. And the limit where the sweep leaves the chunk."""
        read = write = carry = None
        last = before
        if t.logs is not None:
            logs, total = self.device.load(t.logs_s.at[at], ROWS), t.logs_s[at, self.last]
            read, write, carry = jnp.exp2(logs), jnp.exp2(total - logs), jnp.exp2(total)
        if t.limits is not None:
            own, last = self.device.load(t.limits_s.at[at], ROWS), t.limits_s[at, self.last]
            where = lambda kept, x: jnp.where(kept, 1.0 if x is None else x, 0.0)
            read, write, carry = where(own == before, read), where(own == last, write), where(last == before, carry)
        return read, write, carry, last

    def weighted(self, t: Any, i: jax.Array, scores: jax.Array) -> jax.Array:
        """Scores of a query and a key that the sweep meets before it or with it, by what of the key is left."""
        device, at, shape = self.device, t.slot(i), (CHUNK, CHUNK)
        row, column = device.iota(shape, 0), device.iota(shape, 1)
        seen = row <= column if self.reverse else row >= column
        if t.limits is not None:
            limit = by_row(device.load(t.limits_s.at[at], ROWS) - t.chunk(i) * CHUNK, shape)
            seen &= column <= limit if self.reverse else column >= limit
        if t.logs is not None:
            rows, columns = (device.load(t.logs_s.at[at], layout) for layout in (ROWS, COLUMNS))
            scores = scores * jnp.exp2(by_row(rows, shape) - by_column(columns, shape))
        return jnp.where(seen, scores, 0.0)
