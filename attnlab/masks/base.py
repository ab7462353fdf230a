"""What a mask that configs choose by name must say: whole rows, the next rows of a stream, and what it costs.

Adding one is one file in this package: a `Config` of knobs and a `MaskBuilder` under `@register(name)`;
its test gives a definition, to which `tests/masks/laws.py` holds it.

Shapes: as in `attnlab.ops.masks`. What follows from lengths alone is NumPy's, and so known while tracing.
"""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.ops.layout import Layout
from attnlab.ops.mask_algebra import packed_bits
from attnlab.ops.masks import Array, Groups, Mask, numpy_if
from attnlab.registry import Registry

FAR = 2**30  # knobs that are added to positions are below it: their sum is an int32


class Sequence(Protocol):
    """What masks read of where positions stand: the part of `attnlab.mixers.Sequence` that they know."""

    positions: Array
    segments: Array | None
    offsets: Array | None
    padding: Array | None
    grid: tuple[int, int] | None
    layout: Layout | None
    node: Array | None
    step: Array | None

    def mask(self, *, causal: bool, window: int | None = None) -> Mask:
        """Of whole rows: what causality, a window and documents allow."""
        ...


class MaskConfig:
    """Base class of the frozen dataclasses of knobs; what a knob by itself may be is checked here.

    Attributes:
      by_head: the knob that has a value for each query head, or one for all; None: all heads see alike.
    """

    node_name: ClassVar[str]
    by_head: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        config_lib.require_knobs(self)

    def require_heads(self, heads: int, key: str) -> None:
        """Raises ConfigError, whose key is `key` and the knob, where the mask is for another number of query heads."""
        if self.by_head is not None:
            values = getattr(self, self.by_head)
            allowed = f"one for each of the {heads} query heads (heads = {heads}), or one for all, not {len(values)}"
            config_lib.require(len(values) in (1, heads), f"{key}.{self.by_head}", values, allowed)


class MaskBuilder(abc.ABC):
    """Which positions of a sequence see which, beside what causality and documents say.

    Attributes:
      Config: frozen dataclass of `knob` fields.
      name: the registered name.
      paper: title, authors' year and identifier of the source; extension: what here is ours, or empty.
      needs: fields of `Sequence` that it reads; one that is None is refused.
      causal, bidirectional: the directions of a mixer that it goes with; see `unserved`, where knobs have a say.
      cross: whether it is of attention to a context, and of nothing else: see `ContextMask`.
      streaming: "any": a stream may be cut anywhere; "closed": only where no position before the cut sees one after it
        (`attnlab.ops.mask_algebra.closed_cuts`).
      stored: how many `coordinates` a stream keeps of each position.
      span_note: what `span` is where it is not the mean that is seen, as what is seen hangs on the data; empty: it is.
      reads_step: whether in training it hangs on `Sequence.step`.
    """

    Config: ClassVar[type[MaskConfig]]
    name: ClassVar[str]
    paper: ClassVar[str]
    extension: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = False
    cross: ClassVar[bool] = False
    streaming: str = "any"
    stored: ClassVar[int] = 1
    span_note: ClassVar[str] = ""
    reads_step: bool = False

    def __init__(self, config: Any):
        self.config = config

    def require(self, seq: Sequence, *, causal: bool) -> None:
        """Raises UnsupportedPattern for a direction or a missing field that the mask cannot serve."""
        if why := self.unserved(self.config, causal=causal):
            raise UnsupportedPattern(why)
        self._require_needs(seq)

    @classmethod
    def unserved(cls, config: Any, *, causal: bool) -> str:
        """Why it does not go with a direction of a mixer, with this config; empty: it does."""
        direction = "causal" if causal else "bidirectional"
        return "" if getattr(cls, direction) else f"mask {cls.name} does not go with {direction} mixing"

    def require_length(self, length: int) -> None:
        """Raises ConfigError where rows of so many positions can never hold what it is of; default: never."""
        return

    def _require_needs(self, seq: Sequence) -> None:
        for field in self.needs:
            if getattr(seq, field) is None:
                raise UnsupportedPattern(f"mask {self.name!r} reads Sequence.{field}, which is not given")

    @abc.abstractmethod
    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        """Of whole rows, `derived`."""

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        """What a stream keeps of each position beside its key and value: int32 [B, T] each."""
        raise UnsupportedPattern(f"mask {self.name!r} does not stream")

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        """Of the next positions over a cache.

        Args:
          seq: those positions.
          stored: `coordinates` of all keys of the cache, [B, S] each; anything where no key lies yet.
          interval: the causal mask of these positions over the cache.
        """
        raise UnsupportedPattern(f"mask {self.name!r} does not stream")

    def positions(self, seq: Sequence, keys: tuple[Array, ...] | None = None, index: Array | None = None) -> Array:
        """What position encodings turn by, [B, T].

        Args:
          seq: whole rows, or the next positions of a stream.
          keys: in a stream, `coordinates` of all keys, those of these positions among them.
          index: in a stream, [B, T], how many positions are before each.
        """
        del keys, index
        return seq.positions

    def order(self, seq: Sequence) -> np.ndarray | None:
        """The order [T] in which `mask` has the rows and keys of whole rows; None: as they stand."""
        return None

    def lost(self, seq: Sequence, keys: int, *, causal: bool) -> Array | None:
        """Positions of which the mask cannot say what they see, bool [B, T]: a mixer gives NaN there, as jit can raise
        nothing. None: there are none.

        Args:
          seq: whole rows, `derived`, or the next positions of a stream.
          keys: how many the rows have, or the cache.
          causal: the direction of mixing.
        """
        return None

    def of_context(self, seq: Sequence, node: Array | None, interval: Mask) -> Mask:
        """Of positions, of whole rows or of a stream, over the rows of a context.

        Args:
          seq: those positions.
          node: int32 [B, S], `Context.node`; None: it is not given.
          interval: which rows they see by segments and intervals.
        """
        raise UnsupportedPattern(f"mask {self.name!r} is not of attention to a context")

    @abc.abstractmethod
    def span(self, length: int, *, causal: bool) -> float:
        """Mean number of keys that a position of one document of `length` positions sees; else see `span_note`."""


def offsets(seq: Sequence) -> Array:
    """Positions of its document before each position, [B, T]; [1, T] of NumPy where rows are one document."""
    if seq.offsets is not None:
        return seq.offsets
    return np.arange(seq.positions.shape[1], dtype=np.int32)[None]


def require_relation(path: str) -> None:
    """Raises ConfigError where the knob `path` is no name of a file that `relation` reads."""
    config_lib.require(path.endswith(".npy"), "path", path, "a .npy file")


def relation(mask: str, path: str) -> np.ndarray:
    """The file `path` of a mask of that name: bool [n, n]; ConfigError where it is no such file."""
    try:
        table = np.load(pathlib.Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"mask {mask}: path = {path!r} cannot be read: {error}") from None
    array = isinstance(table, np.ndarray)  # not so of an archive by a wrong name
    if not array or table.dtype != bool or table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size:
        found = f"{table.dtype} {table.shape}" if array else "several arrays"
        raise ConfigError(f"mask {mask}: path = {path!r} holds {found}; allowed: bool [n, n], n 1 or more")
    return table


class NodeMask(MaskBuilder):
    """Masks of what positions belong to: `Sequence.node` is a number below n, and a table says which sees which.

    Positions of another number see nothing, and nobody sees them.
    """

    needs = ("node",)
    bidirectional = True
    span_note = "counted without its mask, which hides what is of other numbers: at most so much is seen"

    @abc.abstractmethod
    def table(self) -> np.ndarray:
        """Which number (rows) sees which, bool [n, n]."""

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        return self._narrowed(seq.mask(causal=causal), seq, seq.node)

    def bits(self, seq: Sequence) -> Array:
        """`table` as the bits of `Groups`, uint32 [n, W]."""
        return packed_bits(self.table())

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return (seq.node,)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        return self._narrowed(interval, seq, stored[0])

    def span(self, length: int, *, causal: bool) -> float:
        """That of a mask that hides nothing: how many positions are of which number is not known before."""
        return (length + 1) / 2 if causal else float(length)

    def _narrowed(self, interval: Mask, seq: Sequence, keys: Array) -> Mask:
        rows, bits = seq.node, self.bits(seq)
        n = bits.shape[0]
        xp = numpy_if(isinstance(bits, np.ndarray))
        bits = xp.concatenate([bits, xp.zeros_like(bits[:1])])  # the last: of no number that there is
        own = numpy_if(isinstance(rows, np.ndarray)).where((rows >= 0) & (rows < n), rows, n)
        seen = bits[own] if isinstance(own, np.ndarray) else jnp.asarray(bits)[own]
        group = numpy_if(isinstance(keys, np.ndarray)).where((keys >= 0) & (keys < n), keys, -1)
        return dataclasses.replace(interval, groups=Groups(group, seen[:, None]), documents=False)


class ContextMask(MaskBuilder):
    """Masks of what a context's rows (`Context.node`) and positions (`Sequence.node`) belong to."""

    needs = ("node",)
    causal, cross = False, True
    span_note = "counted without its mask, over a context as long as the sequence: at most so much of it is seen"

    @abc.abstractmethod
    def groups(self, own: Array, rows: Array) -> Groups:
        """Which row is of which group, and which groups a position sees, of `Sequence.node` and `Context.node`."""

    def require(self, seq: Sequence, *, causal: bool) -> None:
        self._require_needs(seq)  # who reads a context sees all of it, whatever `causal` says

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        raise UnsupportedPattern(f"mask {self.name!r} is of attention to a context, and of nothing else")

    def of_context(self, seq: Sequence, node: Array | None, interval: Mask) -> Mask:
        if node is None:
            raise UnsupportedPattern(f"mask {self.name!r} reads Context.node, which is not given")
        return dataclasses.replace(interval, groups=self.groups(seq.node, node))

    def span(self, length: int, *, causal: bool) -> float:
        """That of a mask that hides nothing, of a context as long as the sequence."""
        return float(length)


class BlockMask(MaskBuilder):
    """Masks of whole blocks: documents are cut into blocks of consecutive positions, and a table says which sees which.

    A position sees itself and what came before, where mixing is causal, within the blocks that its block sees.
    """

    @abc.abstractmethod
    def block(self) -> int:
        """Positions of a block."""

    @abc.abstractmethod
    def table(self, blocks: int) -> np.ndarray:
        """Which of the first `blocks` blocks of a document (rows) sees which, bool [blocks, blocks].

        Raises UserError for more than `most_blocks`.
        """

    def most_blocks(self) -> int | None:
        """Blocks of the longest document that there may be; None: any."""
        return None

    def mask(self, seq: Sequence, *, causal: bool) -> Mask:
        size, offset = self.block(), offsets(seq)
        bits = self._bits(self._longest(seq))
        interval, own = seq.mask(causal=causal), (offset // size).astype(np.int32)
        if isinstance(offset, np.ndarray):
            groups = Groups(own, bits[None, None], rows=size, size=size)
        else:
            groups = Groups(own, _of_blocks(bits, own))
        return dataclasses.replace(interval, groups=groups, documents=False)

    def require_length(self, length: int) -> None:
        most = self._most() or length
        allowed = f"{most} or less, as long as a document may be: those of longer rows may be longer"
        config_lib.require(length <= most, f"mask {self.name}: the length of rows", length, allowed)

    def lost(self, seq: Sequence, keys: int, *, causal: bool) -> Array | None:
        """Those behind the last block that there may be; where mixing is not causal, all of such a document."""
        most = self._most()
        if seq.offsets is None or most is None or keys <= most:
            return None
        if causal:
            return seq.offsets >= most
        documents = seq.mask(causal=False)
        return documents.k_end - documents.k_start > most

    def coordinates(self, seq: Sequence) -> tuple[Array, ...]:
        return ((offsets(seq) // self.block()).astype(np.int32),)

    def rows(self, seq: Sequence, stored: tuple[Array, ...], interval: Mask) -> Mask:
        own, length = self.coordinates(seq)[0], stored[0].shape[1]
        bits = self._bits(min(length, self._most() or length))
        return dataclasses.replace(interval, groups=Groups(stored[0], _of_blocks(bits, own)))

    def span(self, length: int, *, causal: bool) -> float:
        """Of a row longer than any document may be: that of the longest document."""
        size, length = self.block(), min(length, self._most() or length)
        sees = self.table(-(-length // size)).astype(np.int64)
        rows = np.minimum(size, length - size * np.arange(len(sees)))
        if not causal:
            return float(rows @ sees @ rows) / length
        before = float(rows @ np.tril(sees, -1) @ rows)
        return (before + float(np.diagonal(sees) @ (rows * (rows + 1) // 2))) / length

    def _bits(self, length: int) -> np.ndarray:
        """Of every block of a document no longer than that, [blocks, W]."""
        return packed_bits(self.table(-(-length // self.block())))

    def _most(self) -> int | None:
        """Positions of the longest document that there may be; None: any."""
        most = self.most_blocks()
        return None if most is None else most * self.block()

    def _longest(self, seq: Sequence) -> int:
        """Positions that no document of whole rows exceeds: of the longest that there may be, where a run tells."""
        (_, length), most = seq.positions.shape, self._most()
        if most is None or length <= most or seq.segments is None:
            return length
        if isinstance(seq.segments, jax.core.Tracer):
            return most
        segments, t = np.asarray(seq.segments), np.arange(length)
        begins = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        before = t - np.maximum.accumulate(np.where(begins, t, 0), axis=1)
        return int(np.where(segments == 0, 0, before + 1).max(initial=1))


def _of_blocks(bits: np.ndarray, own: Array) -> Array:
    """The bits [blocks, W] of rows of blocks `own` [B, T]: [B, 1, T, W]; behind the last block its own."""
    return jnp.asarray(bits)[jnp.minimum(own, len(bits) - 1)][:, None]


MASKS: Registry[MaskBuilder] = Registry("mask", ["attnlab.masks"])
names, get, register = MASKS.names, MASKS.get, MASKS.register


def config_from_node(node: Any, path: str = "mask") -> Any:
    """The typed Config of a node, `{"name": ..., **knobs}` or a name; a Config passes through."""
    return MASKS.config_from_node(node, path)


def build(node: Any) -> MaskBuilder:
    """The builder of a config node or a Config; ConfigError where it is impossible."""
    config = config_from_node(node)
    return get(config.node_name)(config)
