"""What the Hopper kernels are written in: Mosaic GPU's primitives, and stand-ins to run the same source on a CPU.

`DEVICE` is the real thing. jax's GPU interpreter simulates TMA, barriers, warpgroups and shared memory, but no tensor
core accumulator: `interpreted()` gives the primitives with every `wgmma` a plain product of values. It sees races and
wrong barriers; it sees neither asynchronous products nor registers, so kernels are compiled as well.

Kernels keep accumulators as values: they enter a step by `state` and are carried by loops.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import compat

LAYOUT = plgpu.Layout.WGMMA  # of an accumulator [64 n, m], over the 128 threads of a warpgroup
ROWS, COLUMNS = LAYOUT.reduce(1), LAYOUT.reduce(0)  # of what has one number per row of it, per column
SMEM_BYTES = 227 * 1024  # that a block of threads may have
REGISTERS = 240, 24  # of two computing warpgroups and of one that copies: 2 * 240 + 24 is what three start with, 504
_RECENT = compat.VERSION >= (0, 11)


def by_row(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[m] over the columns of [m, n]."""
    return lax.broadcast_in_dim(x, shape, [0])


def by_column(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[n] over the rows of [m, n]."""
    return lax.broadcast_in_dim(x, shape, [1])


def tiles(shape: tuple[int, ...], dtype: Any, unit: int = 128) -> Any:
    """Shared memory for matrices [..., m, n] that TMA writes and the tensor cores read; n in units of so many bytes,
    the same for both operands of a product."""
    elements = unit // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(unit)))


def hidden_zero() -> jax.Array:
    """An operand for a kernel, 0: the minimum of it and a loop's counter is one that no compiler knows.

    Addresses that it is added to are made again in every step; else all are kept in registers through the loop.
    """
    return jnp.zeros((1,), jnp.int32)


def barriers(count: int, arrivals: int = 1) -> Any:
    return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)


@dataclasses.dataclass(frozen=True)
class Device:
    """The primitives on a GPU.

    `scoped(f, shape)` gives `f` an accumulator of zeros; `state(f)(tree)` gives `f` Refs of the tree, accumulators
    where it has `start(x)`, and returns what they hold in the end.
    """

    interpret: Any = None

    wgmma = staticmethod(plgpu.wgmma)
    wgmma_wait = staticmethod(plgpu.wgmma_wait)
    start = staticmethod(plgpu.ACC.init)
    set_registers = staticmethod(plgpu.set_max_registers)

    def scoped(self, f: Callable[[Any], Any], shape: tuple[int, int]) -> Any:
        return pl.run_scoped(f, plgpu.ACC(shape, jnp.float32))

    def state(self, f: Callable[[Any], None]) -> Callable[[Any], Any]:
        return pl.run_state(f)

    def read(self, accumulator: Any, wait: int = 0) -> jax.Array:
        """The accumulator, once all but the last `wait` products are done."""
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=wait)

    def zeros(self, *shape: int) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)

    def full(self, rows: int, value: float) -> jax.Array:
        """[rows], a number per row of an accumulator."""
        return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROWS)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)

    def load(self, ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
        """Registers from memory; not `optimized`: also from global memory."""
        if _RECENT:
            return plgpu.load(ref, layout=layout, optimized=optimized)
        return plgpu.load(ref, (), layout=layout, optimized=optimized)

    def total(self, refs: list[Any], length: int, together: int = 8) -> jax.Array:
        """Of so many numbers in shared memory each, a multiple of `together`, which are read at once: the same for all
        threads, where sums over an accumulator's rows are not."""

        def more(n: jax.Array, sum_: jax.Array) -> jax.Array:
            return sum((ref[n * together + m] for m in range(together) for ref in refs), sum_)

        return lax.fori_loop(0, length // together, more, jnp.float32(0.0))

    def add(self, source: Any, target: Any) -> None:
        """Adds shared memory to global memory, float32, as one of many blocks that do."""
        plgpu.copy_smem_to_gmem(source, target, reduction_op="add")

    def kernel(
        self, name: str, body: Callable[..., None], *, by_lanes: bool = False, sums_bytes: int = 512, **options: Any
    ) -> Callable[..., Any]:
        """A kernel that profiles, and what ptxas says, call by this name.

        by_lanes: whether Mosaic takes layouts from the code, which it does in any case before jax 0.11, and does not
        look for them: where sums over columns and transposed operands meet, its search does not end.
        sums_bytes: of shared memory for sums over an accumulator's rows; those over its columns need none.
        """
        params = _params(sums_bytes, **({"lowering_semantics": plgpu.LoweringSemantics.Lane} if by_lanes else {}))
        named = _named(name, body)
        return plgpu.kernel(named, compiler_params=params, interpret=self.interpret, kernel_name=name, **options)

    def kernel_into(
        self, total: Any, name: str, body: Callable[..., None], *, out_type: Any, scratch_types: Any, **mesh: Any
    ) -> Any:
        """A kernel whose last operand is a Ref, `total`, that its blocks add to. jax 0.10 has it in another form."""
        if _RECENT:
            run = self.kernel(name, body, out_type=out_type, scratch_types=scratch_types, **mesh)
            return lambda *arrays: run(*arrays, total)

        def call(*arrays: Any) -> Any:
            def stateful(refs: Any) -> None:
                def launch() -> None:
                    run = lambda **scratch: body(*refs[0], refs[1], *refs[2], **scratch)
                    pl.run_scoped(run, collective_axes=mesh["thread_name"], **scratch_types)

                pl.core_map(plgpu.Mesh(**mesh), compiler_params=_params(), name=name)(_named(name, launch))

            empty = jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), list(out_type))
            _, added, out = pl.run_state(stateful)((arrays, total[...], empty))
            total[...] = added
            return out

        return call


DEVICE = Device()


def product(device: Device, a: Any, b: Any, shape: tuple[int, int]) -> jax.Array:
    """a b, done."""

    def run(accumulator: Any) -> jax.Array:
        device.wgmma(accumulator, a, b)
        return device.read(accumulator)

    return device.scoped(run, shape)


def added(device: Device, start: jax.Array, *factors: tuple[Any, Any]) -> jax.Array:
    """`start` and products of two, added up, done."""

    def run(accumulator: Any) -> None:
        for a, b in factors:
            device.wgmma(accumulator, a, b)

    return device.state(run)(device.start(start))


def put(memory: Any, x: jax.Array) -> None:
    """Stores to shared memory, for tensor cores and copies to read."""
    memory[...] = x.astype(memory.dtype)
    plgpu.commit_smem()


def fill_ring(stages: int, chunks: int, free: Any, fetch: Callable[[jax.Array], None]) -> None:
    """What a warpgroup does that copies: `fetch` of chunk after chunk, into memory of as many as there are stages, once
    those that read a place have arrived at its barrier in `free`."""

    def again(i: jax.Array) -> None:
        plgpu.barrier_wait(free.at[lax.rem(i, stages)])
        fetch(i)

    filled = min(stages, chunks)
    pl.loop(0, filled)(fetch)
    pl.loop(filled, chunks)(again)
    # Costs nothing; the interpreter wants every arrival seen.
    pl.loop(max(0, chunks - stages), chunks)(lambda i: plgpu.barrier_wait(free.at[lax.rem(i, stages)]))


def _named(name: str, body: Callable[..., None]) -> Callable[..., None]:
    def run(*refs: Any, **scratch: Any) -> None:
        body(*refs, **scratch)

    run.__name__ = run.__qualname__ = name
    return run


def _params(sums_bytes: int = 512, **more: Any) -> plgpu.CompilerParams:
    # Row reductions of accumulators need no scratch, and the default of 2048 bytes can be too much.
    more |= {"reduction_scratch_bytes": sums_bytes}
    return plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, **more)


def missing_interpreter() -> str | None:
    """Why this jax cannot run GPU kernels on a CPU, or None."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return None
    return f"jax {jax.__version__} has no public interpreter of GPU kernels; jax 0.11 has one"


@functools.cache
def interpreted(*, races: bool = False) -> Device:
    """The primitives on a CPU; `races`: prints reads and writes that nothing puts in order.

    Raises ValueError where jax has no interpreter.
    """
    if reason := missing_interpreter():
        raise ValueError(reason)
    return Interpreted(plgpu.InterpretGPUParams(detect_races=races), races)


def device_of(interpret: Any) -> Device:
    """The device of a call with this `interpret`: a GPU where it is False, else the primitives on a CPU.

    Raises ValueError where jax has no interpreter.
    """
    return DEVICE if interpret is False else interpreted(races=bool(getattr(interpret, "detect_races", False)))


class _Value:
    """Stands for an accumulator, or a Ref of `state`."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, _: Any) -> Any:
        return self.value

    def __setitem__(self, _: Any, value: Any) -> None:
        self.value = value


@dataclasses.dataclass(frozen=True)
class _Start:
    value: Any


@dataclasses.dataclass(frozen=True)
class Interpreted(Device):
    """The primitives as plain operations on values."""

    races: bool = False

    start = staticmethod(_Start)

    def wgmma(self, accumulator: _Value, a: Any, b: Any) -> None:
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        accumulator.value = accumulator.value + jnp.dot(a, b, preferred_element_type=jnp.float32)
        if self.races:
            # Tensor cores read shared memory like TMA writes it; these plain reads need a fence to count as ordered.
            plgpu.commit_smem()

    def wgmma_wait(self, _: int) -> None:
        pass

    def set_registers(self, _: int, *, action: str) -> None:
        pass

    def scoped(self, f: Callable[[Any], Any], shape: tuple[int, int]) -> Any:
        return f(_Value(jnp.zeros(shape, jnp.float32)))

    def state(self, f: Callable[[Any], None]) -> Callable[[Any], Any]:
        def run(tree: Any) -> Any:
            leaves, kind = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, _Start))
            refs = [_Value(x.value if isinstance(x, _Start) else x) for x in leaves]
            f(jax.tree.unflatten(kind, refs))
            return jax.tree.unflatten(kind, [ref.value for ref in refs])

        return run

    def read(self, accumulator: _Value, wait: int = 0) -> jax.Array:
        return accumulator.value

    def zeros(self, *shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)

    def full(self, rows: int, value: float) -> jax.Array:
        return jnp.full((rows,), value, jnp.float32)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def load(self, ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
        return ref[...]

    def total(self, refs: list[Any], length: int, together: int = 8) -> jax.Array:
        return sum(ref[...].sum() for ref in refs)

    def add(self, source: Any, target: Any) -> None:
        added = target[...] + source[...]
        if not self.races:  # blocks add in no order, and the interpreter would call it a race
            target[...] = added
