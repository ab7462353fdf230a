"""Which document of a packed row each position is of: what every state that runs along a sequence resets by."""

import math

import jax
import jax.numpy as jnp


def document_index(segments_BT: jax.Array, before_B: jax.Array | None = None) -> jax.Array:
    """How many documents have begun in the row up to each position, int32 [B, T].

    Positions see each other only where the index is equal, and the state that came in only where it is 0. A run of
    padding counts as a document, so that it neither sees nor is seen.

    Args:
      segments_BT: ids; a document is a run of equal ids.
      before_B: the id at the position before the first (-1: none). None: the row begins with a new document.
    """
    if before_B is None:
        before_B = jnp.full(segments_BT.shape[:1], -1, segments_BT.dtype)
    before = jnp.concatenate([before_B[:, None].astype(segments_BT.dtype), segments_BT[:, :-1]], axis=1)
    return jnp.cumsum(segments_BT != before, axis=1, dtype=jnp.int32)


def positions_in_documents(documents_BT: jax.Array, seen_B: jax.Array | None = None) -> jax.Array:
    """Position of each within its document, int32 [B, T].

    Args:
      documents_BT: of `document_index`.
      seen_B: positions of document 0 before the first; None: the row begins with a new document.
    """
    t = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(documents_BT, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(documents_BT != before, t, 0), axis=1)
    return t - start if seen_B is None else jnp.where(documents_BT == 0, seen_B[:, None] + t, t - start)


def document_ends(offset_BT: jax.Array) -> jax.Array:
    """One past the last position in the row of each position's document, int32 [B, T].

    Args:
      offset_BT: positions of its document before each, of `positions_in_documents`; of a row or a piece of a stream.
    """
    length = offset_BT.shape[1]
    t = jnp.arange(length, dtype=jnp.int32)[None]
    last = jnp.pad(offset_BT[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(last, t + 1, length), axis=1, reverse=True)


def largest_input(dtype: jnp.dtype) -> float:
    """What counts as an overflow: the eighth root of the largest number, 65,536 in fp32 and bf16.

    Mixers multiply up to five activations with each other, and sum over positions and channels.
    """
    return math.sqrt(math.sqrt(math.sqrt(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).max)))


def overflowed(
    x_BTD: jax.Array, documents_BT: jax.Array, before_B: jax.Array | None = None, *, causal: bool
) -> jax.Array:
    """Whether a position sees an overflow in its document, bool [B, T]: NaN, or `largest_input` or more.

    In sums over a row that are masked by products, 0 * inf = NaN carries it into the row's other documents, and in a
    backward pass into all that was summed: what has overflowed has to be taken out before.

    Args:
      x_BTD: activations.
      documents_BT: of `document_index`.
      before_B: bool, whether the document of index 0 has overflowed before the first position; None: it has not.
      causal: whether a position sees only itself and those before.
    """
    bad = ~jnp.all(jnp.abs(x_BTD) < largest_input(x_BTD.dtype), axis=-1)
    newest = jax.lax.cummax(jnp.where(bad, documents_BT, -1), axis=1)  # indices ascend along a row
    lost = newest == documents_BT
    if before_B is not None:
        lost |= before_B[:, None] & (documents_BT == 0)
    if causal:
        return lost
    none = jnp.iinfo(documents_BT.dtype).max
    return lost | (jax.lax.cummin(jnp.where(bad, documents_BT, none), axis=1, reverse=True) == documents_BT)
