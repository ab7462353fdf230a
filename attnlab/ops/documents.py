"""Which document of a packed row each position is of: what every state that runs along a sequence resets by."""

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
