"""Causal depthwise convolution along the sequence, with the tail that streaming needs."""

import jax
import jax.numpy as jnp

from attnlab.ops.linear import per_channel


def causal_conv(
    x_BTC: jax.Array,
    kernel_KC: jax.Array,
    documents_BT: jax.Array | None = None,
    tail_BJC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`y[t] = sum_i kernel[K - 1 - i] * x[t - i]`, i = 0 .. K - 1, over positions of the same document.

    Args:
      x_BTC: inputs.
      kernel_KC: one filter per channel; row K - 1 weighs the position itself.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      tail_BJC: the J = K - 1 inputs before the first, zero where there is none in the document; None: none.

    Returns:
      y_BTC in the dtype of x (sums in fp32, or fp64), and the tail after the last position.
    """
    dtype = jnp.promote_types(x_BTC.dtype, jnp.float32)
    B, T, C = x_BTC.shape
    J = kernel_KC.shape[0] - 1
    if tail_BJC is None:
        tail_BJC = jnp.zeros((B, J, C), x_BTC.dtype)
    x = jnp.concatenate([tail_BJC.astype(x_BTC.dtype), x_BTC], axis=1)
    documents = None
    if documents_BT is not None:
        documents = jnp.pad(documents_BT, ((0, 0), (J, 0)))  # the tail is of document 0, which goes on
    y = jnp.zeros((B, T, C), dtype)
    for row in range(J + 1):
        seen = x[:, row : row + T].astype(dtype)
        if documents is not None and row < J:
            seen = jnp.where((documents[:, row : row + T] == documents_BT)[..., None], seen, 0)
        y += per_channel(kernel_KC[row].astype(dtype), seen)
    tail = x[:, T:]
    if documents is not None:
        tail = jnp.where((documents[:, T:] == documents[:, -1:])[..., None], tail, 0)
    return y.astype(x_BTC.dtype), tail
