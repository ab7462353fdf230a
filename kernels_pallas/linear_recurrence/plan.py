"""What is static of a call on TPU, which block sizes it takes, and how a kernel's arrays become blocks.

Shapes: `B` batch, `T` positions, `H` heads, `d` and `e` padded widths of keys and values, `C` positions of a chunk, `M`
chunks of a block, `N` blocks of a sequence, `G` groups of heads. Arrays of positions lie as [B, T, H w]: a block is
`M C` positions of a group of heads. Queries and keys that heads share lie as [B, T, d], their gradients as
[B, G, T, d]. Numbers per position are rows, [B, H, N M, 1, C].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuning
from kernels_pallas.mosaic import Slots

LANES = 128
_NARROWEST = 16  # width
_CHUNKS, _FEW_CHUNKS = 8, 2  # of a block at most; with features or decays of channels: more take minutes to compile
_SHARED_CHUNKS = 4  # where heads share queries and keys: a backward of more spills
JOINED = (16, 32, 64, 128)  # positions of a chunk where channels have their own decays
_STEP, _ALONE = 0.15, 2.8  # what a step costs beside its chunks, in chunks; what it costs beside its heads, in heads
_SLACK = 4 * 2**20  # bytes of fast memory for the compiler's own


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Blocks of both directions, which share their positions: the forward saves the state before each for the backward.

    Attributes:
      chunk: C, a multiple of 16.
      chunks: M.
      forward_heads, backward_heads: of a block; all, or so many that widths times heads are multiples of 128.
    """

    chunk: int = LANES
    chunks: int = _CHUNKS
    forward_heads: int = 8
    backward_heads: int = 4


class Features(NamedTuple):
    """What the products read instead of queries and keys x: scale[i] y[first[i]] y[second[i]], y = [x, 1].

    They are made on chip, and never written out.
    """

    width: int  # of x
    first: tuple[int, ...]
    second: tuple[int, ...]
    scale: tuple[float, ...]

    def tables(self, dtype: str) -> dict[str, np.ndarray]:
        """`ones_*`: [w, d], a column for each feature, 1 at its channel; `rest`: [3, d], what the factors have beside
        it, and the scale; w and d are padded."""
        w, d = padded_width(self.width), padded_width(len(self.scale))
        rest, found = np.zeros((3, d), np.float32), {}
        for row, (name, channels) in enumerate((("ones_first", self.first), ("ones_second", self.second))):
            pick = np.zeros((self.width + 1, d), np.float32)
            pick[np.asarray(channels), np.arange(len(channels))] = 1
            rest[row] = pick[-1]
            found[name] = np.pad(pick[:-1], ((0, w - self.width), (0, 0))).astype(jnp.dtype(dtype))
        rest[2, : len(self.scale)] = self.scale
        return found | {"rest": rest}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      shape: B, T, H, d, e; d is what the products read.
      dtype: of products.
      constant: whether heads decay at fixed rates, else by a number per position.
      documents: whether positions have documents.
      column: whether values have one more column beside their e.
      given: whether there is a state before the first position.
      kind: of the devices (`kernels_pallas.tuning.kind`).
      wants_decay: whether the backward gives the gradient of the decay.
      features: of queries and keys; None: themselves.
      channels: whether each channel of the keys has a decay of its own.
      shared: whether all heads have the same queries and keys, [B, T, d].
    """

    shape: tuple[int, int, int, int, int]
    dtype: str
    constant: bool
    documents: bool
    column: bool
    given: bool
    sizes: Sizes
    kind: str
    interpret: Any
    wants_decay: bool = False
    features: Features | None = None
    channels: bool = False
    shared: bool = False

    @property
    def key_width(self) -> int:
        """Of queries and keys as they lie, padded."""
        return self.shape[3] if self.features is None else padded_width(self.features.width)

    @property
    def positions(self) -> int:
        """Of a block."""
        return self.sizes.chunk * self.sizes.chunks

    @property
    def blocks(self) -> int:
        """N."""
        return -(-self.shape[1] // self.positions)

    @property
    def ragged(self) -> bool:
        """Whether the last block ends behind the last position."""
        return self.shape[1] % self.positions != 0

    def flops(
        self, of_pairs: int, of_states: int, of_features: int = 0, *, shared_pairs: int = 0, heads: int = 1
    ) -> int:
        """Of products of so many width units: over pairs within a chunk, of states, between keys and features, and over
        pairs once for so many `heads`, where these share queries and keys."""
        B, _, H, d, e = self.shape
        each = self.sizes.chunk * of_pairs + d * e * of_states
        if self.features is not None:
            each += d * self.key_width * of_features
        groups = -(-H // heads) if self.shared else H
        return 2 * B * self.blocks * self.positions * (H * each + groups * self.sizes.chunk * shared_pairs)


def kernel_name(channels: bool, direction: str) -> str:
    """Of a kernel in a program."""
    return f"linear_recurrence_{'channels_' * channels}{direction}"


def pair_products(chunk: int, channels: bool) -> int:
    """Products of a chunk's queries and keys that stand for one."""
    return joints(chunk) if channels else 1


def forward_flops(plan: Plan) -> int:
    """Of the kernel's products, without those that only spread or add numbers."""
    (*_, d, e), scores = plan.shape, pair_products(plan.sizes.chunk, plan.channels)
    return plan.flops(e, 2, 4, shared_pairs=scores * d, heads=plan.sizes.forward_heads)


def backward_flops(plan: Plan) -> int:
    """As `forward_flops`."""
    (*_, d, e), chunks = plan.shape, plan.sizes.chunks
    again = plan.flops(0, 1, 2) * (chunks - 1) // chunks
    scores = pair_products(plan.sizes.chunk, plan.channels) * d
    own = plan.flops(2 * scores + 2 * e, 4, 12, shared_pairs=scores, heads=plan.sizes.backward_heads)
    return own + again


def padded_width(width: int) -> int:
    """A power of two from 16, or a multiple of 128: heads side by side then do not straddle registers needlessly."""
    if width > LANES:
        return -(-width // LANES) * LANES
    return max(_NARROWEST, 1 << (width - 1).bit_length())


def has_column(width: int) -> bool:
    """Whether the last column of so many values goes by itself: it alone would take a width of its own."""
    return width > _NARROWEST and padded_width(width - 1) == width - 1


def side_by_side(x_BTHw: jax.Array, width: int) -> jax.Array:
    """[B, T, H width], zeros behind each head's."""
    x = jnp.pad(x_BTHw, ((0, 0), (0, 0), (0, 0), (0, width - x_BTHw.shape[3])))
    return x.reshape(*x.shape[:2], -1)


def sizes(
    length: int,
    heads: int,
    width: int,
    value_width: int,
    itemsize: int,
    kind: str,
    key_width: int | None = None,
    channels: bool = False,
    shared: bool = False,
) -> Sizes | None:
    """Blocks for these lengths and padded widths; None where no state of a head fits into fast memory.

    `key_width`: of queries and keys as they lie, where the products read others; `channels`: with their own decays;
    `shared`: queries and keys of all heads.
    """
    lies = width if key_width is None else key_width
    chunk = joined_chunk(length) if channels else min(LANES, -(-length // 16) * 16)
    of = lambda count: functools.partial(count, lies, channels=channels)
    most = _SHARED_CHUNKS if shared else _CHUNKS if lies == width and not channels else _FEW_CHUNKS
    needed = (8, of(forward_bytes)), (4, of(backward_bytes))
    return fitting(chunk, most, needed, length, heads, width, value_width, itemsize, kind, lies)


def joined_chunk(length: int) -> int:
    """Positions of a chunk whose blocks are joined two by two."""
    return min(JOINED[-1], max(JOINED[0], 1 << (length - 1).bit_length()))


def fitting(
    chunk: int,
    most_chunks: int,
    needed: Sequence[tuple[int, Callable[..., int]]],
    length: int,
    heads: int,
    width: int,
    value_width: int,
    itemsize: int,
    kind: str,
    key_width: int | None = None,
) -> Sizes | None:
    """`sizes` with a given chunk and at most so many of a block; `needed`: of each direction the most heads, and the
    bytes of fast memory that it takes for heads, chunk, chunks, widths and size of an item."""
    count = -(-length // chunk)
    steps = lambda chunks: -(-count // chunks) * (chunks + _STEP)
    for chunks in sorted(range(1, most_chunks + 1), key=lambda n: (steps(n), -n)):
        found = []
        for most, of in needed:
            fits = lambda n: of(n, chunk, chunks, width, value_width, itemsize) <= tuning.vmem_limit(kind)
            found.append(_group(heads, key_width or width, value_width, most, fits))
        if None not in found:
            return Sizes(chunk, chunks, *found)
    return None


def _group(heads: int, width: int, value_width: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """Heads of a block: `most` at most, unless only more fill whole lanes. The last group may lack some."""
    lanes = lambda n: n == heads or n * width % LANES == 0 == n * value_width % LANES
    able = [n for n in range(1, heads + 1) if lanes(n) and fits(n)]
    within = [n for n in able if n <= most] or able[:1]
    return min(within, key=lambda n: (-(-heads // n) * (n + _ALONE), -n), default=None)


def forward_bytes(
    key_width: int, heads: int, chunk: int, chunks: int, d: int, e: int, itemsize: int, *, channels: bool = False
) -> int:
    """Of fast memory in the forward: windows in two buffers, the state, tables, and values of all heads at a time."""
    windows = 2 * (2 * chunk * chunks * (key_width + e) * itemsize + 3 * d * e * 4)
    decays = forward_channels(chunk, chunks, d) if channels else 4 * chunk * (chunk + 2 * max(d, e))
    return heads * (windows + decays + 8 * d * e + 4 * chunk * (chunk + d + 2 * e)) + _SLACK


def backward_bytes(
    key_width: int, heads: int, chunk: int, chunks: int, d: int, e: int, itemsize: int, *, channels: bool = False
) -> int:
    """As `forward_bytes`; the states before each chunk are made again. What the compiler adds for float32 was measured
    (d 2048, e 256, v5p), not derived."""
    windows = 2 * (chunk * chunks * (4 * key_width + 3 * e) * itemsize + 3 * d * e * 4)
    decays = backward_channels(chunk, chunks, d, 2 * itemsize) if channels else 4 * chunk * (chunk + 2 * max(d, e))
    own = windows + decays + 4 * (chunks + 2) * d * e + 4 * chunk * (2 * chunk + 4 * d + 2 * e)
    return heads * own + (24 * chunk * d if itemsize == 4 else 0) + _SLACK


def joints(chunk: int) -> int:
    """Sizes of blocks that are joined two by two to a chunk, where channels have their own decays."""
    return chunk.bit_length() - 1


def forward_channels(chunk: int, chunks: int, d: int) -> int:
    """Bytes of a head's decays of channels in the forward: windows, and weights of a chunk at all joints."""
    return chunk * d * 4 * (2 * chunks + joints(chunk) + 2)


def backward_channels(chunk: int, chunks: int, d: int, met: int) -> int:
    """As `forward_channels`, of all chunks, with their gradient's windows; `met`: bytes of what meets at a joint, for
    each channel of a position."""
    return chunk * d * (4 * (4 + joints(chunk) + 2) * chunks + met * joints(chunk))


class Blocks(Slots):
    """A kernel's arrays, in blocks of a grid over sequences, groups of heads and blocks of positions.

    `heads`: of a group; `reverse`: whether the last block of positions comes first.
    """

    def __init__(self, plan: Plan, heads: int, reverse: bool):
        super().__init__()
        self.plan, self.heads = plan, heads
        self.at = (lambda n: plan.blocks - 1 - n) if reverse else (lambda n: n)
        self.grid = (plan.shape[0], -(-plan.shape[2] // heads), plan.blocks)

    def positions(self, width: int) -> pl.BlockSpec:
        """Of [B, T, H w]."""
        return pl.BlockSpec((1, self.plan.positions, self.heads * width), lambda b, h, n: (b, self.at(n), h))

    def keys(self) -> pl.BlockSpec:
        """Of queries and keys [B, T, H w], or [B, T, w] of all heads."""
        width, plan = self.plan.key_width, self.plan
        if not plan.shared:
            return self.positions(width)
        return pl.BlockSpec((1, plan.positions, width), lambda b, h, n: (b, self.at(n), 0))

    def key_gradients(self) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """Shape and blocks of their gradients: as they lie, or [B, G, T, w], of each group of heads."""
        (B, T, H, *_), width, plan = self.plan.shape, self.plan.key_width, self.plan
        if not plan.shared:
            return (B, T, H * width), self.positions(width)
        of_group = pl.BlockSpec((1, 1, plan.positions, width), lambda b, h, n: (b, h, self.at(n), 0))
        return (B, self.grid[1], T, width), of_group

    def rows(self) -> pl.BlockSpec:
        """Of [B, H, N M, 1, C]."""
        s = self.plan.sizes
        return pl.BlockSpec((1, self.heads, s.chunks, 1, s.chunk), lambda b, h, n: (b, h, self.at(n), 0, 0))

    def shared_rows(self) -> pl.BlockSpec:
        """Of [B, N M, 1, C], the same for all heads."""
        s = self.plan.sizes
        return pl.BlockSpec((1, s.chunks, 1, s.chunk), lambda b, h, n: (b, self.at(n), 0, 0))

    def states(self, *shape: int) -> pl.BlockSpec:
        """Of [B, H, ...]."""
        return pl.BlockSpec((1, self.heads, *shape), lambda b, h, n: (b, h, 0, 0))

    def saved_states(self, *shape: int) -> pl.BlockSpec:
        """Of [B, N, H, ...]."""
        return pl.BlockSpec((1, 1, self.heads, *shape), lambda b, h, n: (b, self.at(n), h, 0, 0))

    def gates(self, arrays: Mapping[str, Any]) -> None:
        """The inputs that both directions begin with: decays in log2 units, documents' first positions, features."""
        plan, H = self.plan, self.plan.shape[2]
        if plan.constant:
            whole = jnp.pad(arrays["logs"], (0, self.grid[1] * self.heads - H))
            self.input("logs", whole, pl.BlockSpec(memory_space=pltpu.SMEM))
        elif plan.channels:
            self.input("logs", arrays["logs"], self.positions(plan.shape[3]))
        else:
            self.input("logs", jnp.cumsum(as_rows(plan, arrays["logs"]), -1), self.rows())
        self.documents(arrays)
        for name, table in ({} if plan.features is None else plan.features.tables(plan.dtype)).items():
            self.input(name, jnp.asarray(table), pl.BlockSpec(table.shape, lambda b, h, n: (0, 0)))

    def documents(self, arrays: Mapping[str, Any]) -> None:
        """First positions of documents, where there are any."""
        plan, T = self.plan, self.plan.shape[1]
        if plan.documents:
            starts = jnp.pad(arrays["starts"], ((0, 0), (0, plan.blocks * plan.positions - T)), mode="edge")
            self.input("starts", starts.reshape(starts.shape[0], -1, 1, plan.sizes.chunk), self.shared_rows())

    def tables(self) -> None:
        """Scratch for what is the same in every chunk where decays are constant."""
        C, wide = self.plan.sizes.chunk, max(self.plan.shape[3:])
        if self.plan.constant:
            for name, width in (("pairs", C), ("read", wide), ("write", wide)):
                self.scratch(name, (self.heads, C, width), jnp.float32)

    def run(self, kernel: Callable[..., None], name: str, flops: int) -> dict[str, jax.Array]:
        """The outputs of `kernel(*refs)`, by name."""
        return self.call(
            kernel,
            grid=self.grid,
            semantics=("parallel", "parallel", "arbitrary"),
            name=name,
            scope=name.rpartition("_")[0],
            vmem=tuning.vmem_limit(self.plan.kind),
            interpret=self.plan.interpret,
            cost=pl.CostEstimate(flops=flops, bytes_accessed=self.bytes_moved(), transcendentals=0),
        )

    def bytes_moved(self) -> int:
        """From and to the device's memory: every array once, what heads share once for each group of them."""
        total = 0
        for name, (array, _) in (*self.inputs.items(), *self.outputs.items()):
            once = math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
            shared = ("starts", "q", "k") if self.plan.shared else ("starts",)
            total += once * (self.grid[1] if name in shared else 1)
        return total


def as_rows(plan: Plan, x_BHT: jax.Array) -> jax.Array:
    """[B, H, N M, 1, C] in float32, zeros behind."""
    behind = plan.blocks * plan.positions - x_BHT.shape[2]
    x = jnp.pad(x_BHT.astype(jnp.float32), ((0, 0), (0, 0), (0, behind)))
    return x.reshape(*x.shape[:2], -1, 1, plan.sizes.chunk)


def from_rows(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, H, T] from [B, H, N M, 1, C]."""
    return x.reshape(*x.shape[:2], -1)[:, :, : plan.shape[1]]
