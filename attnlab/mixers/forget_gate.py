"""What forget gates leave of the past: layers of softmax attention whose logits fade add it to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.mixers.sequence import Sequence
from attnlab.ops.segmented_ema import segmented_ema


def log_left(logits_BTH: jax.Array, seq: Sequence) -> jax.Array:
    """Sums of log sigmoid(logits) [B, T, H] from the start of each document, or of the sequence; in the logits' dtype,
    which is fp32 or wider."""
    B, T, H = logits_BTH.shape
    goes_on = jnp.ones((B, T), bool) if seq.offsets is None else seq.offsets > 0
    # A stream's first position goes on with a document, of which 0 is forgotten yet.
    goes_on = jnp.broadcast_to(goes_on[..., None], (B, T, H)).astype(logits_BTH.dtype)
    logs = jax.nn.log_sigmoid(logits_BTH)
    return segmented_ema(goes_on, logs[:, :, None], jnp.zeros((B, 1, H), logs.dtype))[:, :, 0]
