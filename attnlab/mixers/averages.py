"""Parameters that are moving averages of what training sees: they take what is to be averaged as their gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def averaging(y: jax.Array, averages: Any, seen: Any) -> jax.Array:
    """y, by whose way back the parameters `averages`, of role `average`, learn what was `seen`.

    The gradient of `averages` is `seen`, whatever the loss is: sums over the batch, so that gradients of micro-batches
    and of devices add up to those of the whole (the number 1 then counts micro-batches). An update makes of them `keep
    averages + (1 - keep) seen` (`attnlab.train.optimizers`). As a trainer divides its gradients by the batch's weight,
    what is read of averages is to be a ratio of two of them. Without gradients, in evaluation and decoding, nothing
    changes.

    Args:
      y: what the layer gives; its gradient passes unchanged.
      averages: tree of the parameters' arrays.
      seen: tree like it, without a gradient.
    """
    return y


def _forward(y: jax.Array, averages: Any, seen: Any) -> tuple[jax.Array, Any]:
    return y, jax.tree.map(lambda a, s: s.astype(a.dtype), averages, seen)


def _backward(seen: Any, gradient: jax.Array) -> tuple[jax.Array, Any, Any]:
    return gradient, seen, jax.tree.map(jnp.zeros_like, seen)


averaging.defvjp(_forward, _backward)
