"""Products of activations with weights: a matrix, or one weight per channel."""

from typing import Any

import jax

from attnlab.parallel import partition


def project(x: jax.Array, w_IO: jax.Array, dtype: Any = None) -> jax.Array:
    """`x @ w` for x [..., I]: the one product of activations with a matrix, where quantisers find it.

    They replace `jax.lax.dot_general`, which is called here and nowhere else with weights.

    Args:
      x, w_IO: of one dtype.
      dtype: of the result and its sums; None: that of x.
    """
    return jax.lax.dot_general(x, w_IO, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


def linear(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """`x @ w` for x [..., I], in the dtype of x.

    On CPU the product is of a matrix of rows, or of a vector where there is one row: XLA there transposes and copies
    activations of three axes for the backward products, and takes a slow path for one row. Elsewhere, and where both
    axes of the rows are split over devices, they stay apart.
    """
    if partition.platform() != "cpu" or partition.ways("seq") > 1:
        return project(x, w_IO)
    rows = x.reshape(-1) if x.size == w_IO.shape[0] else x.reshape(-1, w_IO.shape[0])
    return project(rows, w_IO).reshape(*x.shape[:-1], w_IO.shape[1])


def per_channel(w: jax.Array, x: jax.Array) -> jax.Array:
    """`w * x` for x [..., C] and w [C], or of more of x's last axes, in the dtype that they promote to.

    The gradient for w is one sum over all axes that it lacks. What broadcasting alone gives leaves out axes of size 1,
    and for such a sum of products XLA takes 20 times as long on CPU (a batch of one row).
    """
    return jax.lax.broadcast_in_dim(w, x.shape, range(x.ndim - w.ndim, x.ndim)) * x
