"""What mixers around one linear recurrence share: its state along a stream, and its call."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.mixers.base import Sequence
from attnlab.mixers.parts import param_dtype
from attnlab.ops.documents import document_index
from attnlab.ops.linear_recurrence import linear_recurrence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """What a linear recurrence remembers.

    Attributes:
      memory: [B, H, d, e] fp32 (fp64), the sum of key-value products of the current document.
      segment: [B] int32, id of the current document, -1 before the first position.
    """

    memory: jax.Array
    segment: jax.Array

    @classmethod
    def empty(cls, batch: int, heads: int, width: int, value_width: int, dtype: Any) -> RecurrentState:
        """The state before the first position."""
        memory = jnp.zeros((batch, heads, width, value_width), param_dtype(dtype))
        return cls(memory, jnp.full((batch,), -1, jnp.int32))


def recur(
    q: jax.Array, k: jax.Array, u: jax.Array, seq: Sequence, state: RecurrentState | None, **options: Any
) -> tuple[jax.Array, RecurrentState]:
    """`linear_recurrence` from the state on, or of whole sequences, restarted at every document of `seq`."""
    batch, length = q.shape[:2]
    segments = jnp.ones((batch, length), jnp.int32) if seq.segments is None else seq.segments
    whole = seq.segments is None and state is None
    documents = None if whole else document_index(segments, None if state is None else state.segment)
    memory = None if state is None else state.memory
    o, memory = linear_recurrence(q, k, u, documents_BT=documents, state_BHde=memory, **options)
    return o, RecurrentState(memory, segments[:, -1])
