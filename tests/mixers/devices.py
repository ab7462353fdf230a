"""A program split over eight devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.parallel import partition
from attnlab.train import sharding
from attnlab.train.config import MeshConfig


def widened(tree: Any) -> Any:
    """Arrays [2, T, ...] as [8, T + 1, ...]: each row four times, and one more position, 0, so that T + 1 is even."""
    more = lambda a: np.pad(np.asarray(a), [(0, 0), (0, 1)] + [(0, 0)] * (np.ndim(a) - 2))
    return jax.tree.map(lambda a: np.concatenate([more(a)] * 4), tree)


def split(run: Callable[..., Any], length: int, **sizes: int) -> Callable[..., Any]:
    """`run` of batches of eight rows of so many positions, compiled for rows and heads split in two, and `sizes`."""
    assert jax.device_count() == 8
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, "fsdp": 2, "tensor": 2} | sizes), 8, length=length)
    return jax.jit(partition.traced(run, mesh, sharding.ACTIVATION_RULES))


def hold(graphdef: Any, params: Any, x: Any, seq: Any, **sizes: int) -> Any:
    """y and gradients of x [2, T, D] and packed rows are the same on eight devices, split as `split` says; those of x
    of one device."""
    x, seq = widened((x, seq))

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x, seq):
        y = nnx.merge(graphdef, params)(x, seq).y
        return jnp.sum(jnp.where((seq.segments > 0)[..., None], jnp.sin(y), 0)), y

    expected, got = jax.jit(run)(params, x, seq), split(run, x.shape[1], **sizes)(params, x, seq)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()))
    return expected[1][1][:2, :-1]
