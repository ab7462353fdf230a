"""Where the positions of a batch stand: documents, derived once for all layers, and the stream that they continue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnlab.ops.documents import document_index, positions_in_documents
from attnlab.ops.layout import Layout
from attnlab.ops.masks import Mask, mask_of_documents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What cross-attention reads: S rows per row of the batch, and which of them each query sees.

    A query sees rows of its own segment, where both have segments, that lie in its interval, where there are intervals;
    one that sees none gets exactly 0.

    Attributes:
      rows: [B, S, D_c]; None in a stream, whose state has the keys and values made of them.
      segments: [B, S] int32 or None. Rows of a document carry its id in `Sequence.segments` and are contiguous; 0 is
        padding, which nobody sees. In a stream they are those given to `init_state`.
      positions: [B, S] int32, for mixers that rotate them too; None: 0 to S - 1.
      starts, ends: [B, T] int32 or None: query t sees rows s with `starts[t] <= s < ends[t]`.
      node: [B, S] int32, a number of what a row belongs to (a region), for masks that read it; None: not said. In a
        stream it is that given to `init_state`.
    """

    rows: jax.Array | None = None
    segments: jax.Array | None = None
    positions: jax.Array | None = None
    starts: jax.Array | None = None
    ends: jax.Array | None = None
    node: jax.Array | None = None

    @classmethod
    def aligned(cls, rows: jax.Array, length: int) -> Context:
        """Query t of `length` sees rows s <= t S / length: two streams that run along each other, as in translation."""
        batch, S = rows.shape[:2]
        ends = jnp.arange(length, dtype=jnp.int32) * S // length + 1
        return cls(rows, ends=jnp.broadcast_to(ends, (batch, length)))

    def mask(self, seq: Sequence, segments: jax.Array | None, size: int) -> Mask:
        """Which of `size` rows, of `segments`, the positions of `seq` see."""
        batch, length = seq.positions.shape
        start = jnp.zeros((batch, length), jnp.int32) if self.starts is None else self.starts
        end = jnp.full((batch, length), size, jnp.int32) if self.ends is None else jnp.minimum(self.ends, size)
        if segments is not None:
            own = jnp.ones((batch, length), jnp.int32) if seq.segments is None else seq.segments
            same = (own[:, :, None] == segments[:, None]) & (own != 0)[..., None]
            s = jnp.arange(size, dtype=jnp.int32)
            start = jnp.maximum(start, jnp.min(jnp.where(same, s, size), axis=-1, initial=size))
            end = jnp.minimum(end, jnp.max(jnp.where(same, s + 1, 0), axis=-1, initial=0))
        if seq.padding is not None:
            end = jnp.where(seq.padding, 0, end)
        return Mask(start, end)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """Where the positions of a batch stand.

    Attributes:
      positions: [B, T] int32, position within its document, for position encodings.
      segments: [B, T] int32 or None. Documents packed in one row carry different ids and are contiguous; 0 is padding.
        None says that every row is one document without padding.
      documents: [B, T] int32, which document of the row a position is of (`attnlab.ops.documents`); 0 is the one that a
        stream was in before. None where `segments` is, outside a stream. Derived from `segments`, as `offsets` is.
      offsets: [B, T] int32, positions of its document before it, in the row and in the stream, whatever `positions`
        says.
      contexts: by name, what cross-attention reads; None: nothing.
      grid: rows and columns of an image whose pixels or patches, row by row, are the last positions of every row of the
        batch; those before them (a class token) are not of the image. None where there is no image.
      layout: where images and questions lie in rows of text, for masks that read it; None: not said.
      node: [B, T] int32, a number of what a position belongs to (a subject), for masks that read it; None: not said.
      boxes: [B, T, 4], x and y of the middle, width and height of the box of the object that a position is, all 0 of a
        position that is none; None: not said.
      text: [n, D], the embeddings of a fixed text, n positions from where a document begins, for mixers that read it;
        None: not given.
      layer: int32 scalar, the number of the block in its stack, from 0; None where no mixer of the stack reads it
        (`Mixer.stack_reads`), or the mixer is by itself.
      step: int32 scalar, the number of the training step, from 0; None outside of training, or where no mixer of the
        stack reads it.
      embedding: [B, T, D], what the stack began from, or what a model gives in its place, of the width that mixers read
        (`Mixer.embedding_width`); None as `layer`.
      second: whether these positions are a second stream of the stack (`MixerConfig.second_stream`) itself.
      sides: [1, n, D], or None, for each mixer of a block: its `side`. None: there is no second stream.
      side: [1, n, D], what the mixer's layer reads of the second stream, of each position that a document may have;
        None: the mixer reads none, or is by itself.
      shared: by name, what layers before hand to those after (`Mixer.init_shared`, `MixerOutput.shared`); None: the
        mixer is by itself.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    documents: jax.Array | None = None
    offsets: jax.Array | None = None
    contexts: Mapping[str, Context] | None = None
    grid: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    layout: Layout | None = None
    node: jax.Array | None = None
    boxes: jax.Array | None = None
    text: jax.Array | None = None
    layer: jax.Array | None = None
    step: jax.Array | None = None
    embedding: jax.Array | None = None
    second: bool = dataclasses.field(default=False, metadata={"static": True})
    sides: tuple[jax.Array | None, ...] | None = None
    side: jax.Array | None = None
    shared: Mapping[str, jax.Array] | None = None

    @classmethod
    def whole(cls, batch: int, length: int) -> Sequence:
        """One unpadded document per row, positions 0 to length - 1."""
        return cls(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)))

    @property
    def padding(self) -> jax.Array | None:
        """[B, T] bool, which positions are padding; None: none."""
        return None if self.segments is None else self.segments == 0

    def derived(self) -> Sequence:
        """The same, of whole rows, with `documents` and `offsets`: a stack derives them once for all its layers."""
        if self.segments is None or self.documents is not None:
            return self
        documents = document_index(self.segments)
        return dataclasses.replace(self, documents=documents, offsets=positions_in_documents(documents))

    def mask(self, *, causal: bool, window: int | None = None) -> Mask:
        """Which positions of whole rows, `derived`, see which: those of their document, and none from padding."""
        if self.segments is None:
            return Mask(causal=causal, window=window)
        return mask_of_documents(self.offsets, self.segments, causal=causal, window=window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Where a stream stands between two pieces: what all layers know of those before.

    Attributes:
      segment: [B] int32, id of the current document, -1 before the first position.
      offset: [B] int32, positions of that document so far.
    """

    segment: jax.Array
    offset: jax.Array

    @classmethod
    def start(cls, batch: int) -> Stream:
        """Before the first position."""
        return cls(jnp.full((batch,), -1, jnp.int32), jnp.zeros((batch,), jnp.int32))

    def extend(self, seq: Sequence) -> tuple[Sequence, Stream]:
        """The next positions with `documents` and `offsets`, as `Mixer.extend` takes them, and the stream after them.

        Without segments all positions of the stream are one document of id 1.
        """
        segments = jnp.ones(seq.positions.shape, jnp.int32) if seq.segments is None else seq.segments
        documents = document_index(segments, self.segment)
        offsets = positions_in_documents(documents, self.offset)
        seq = dataclasses.replace(seq, segments=segments, documents=documents, offsets=offsets)
        return seq, Stream(segments[:, -1], offsets[:, -1] + 1)
