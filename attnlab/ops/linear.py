"""The product of activations with a weight matrix."""

import jax


def linear(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """`x @ w` for x [..., I], in the dtype of x.

    On CPU all three products, forward and backward, run on a matrix of rows, or on a vector where there is one row: XLA
    there transposes and copies activations of three axes for the backward products, and takes a slow path for one row.
    Elsewhere the axes stay apart, so that each can be sharded.
    """
    if jax.default_backend() != "cpu":
        return x @ w_IO
    if x.size == w_IO.shape[0]:
        return (x.reshape(-1) @ w_IO).reshape(*x.shape[:-1], w_IO.shape[1])
    return _rows(x, w_IO)


@jax.custom_vjp
def _rows(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    return (x.reshape(-1, x.shape[-1]) @ w_IO).reshape(*x.shape[:-1], w_IO.shape[1])


def _rows_forward(x: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows(x, w_IO), (x, w_IO)


def _rows_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w_IO = residuals
    x_NI, dy_NO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx_NI = jax.lax.dot_general(dy_NO, w_IO, (((1,), (1,)), ((), ())))
    dw_IO = jax.lax.dot_general(x_NI, dy_NO, (((0,), (0,)), ((), ())))
    return dx_NI.reshape(x.shape), dw_IO


_rows.defvjp(_rows_forward, _rows_backward)
