"""A chunk of the delta rule in which every channel decays at its own rate: see `linear_recurrence.channels`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels_pallas.linear_recurrence.channels import Decays, Pairs, scores
from kernels_pallas.mosaic import product

if TYPE_CHECKING:
    from kernels_pallas.delta_rule.chunk import DeltaStep


def forward(step: DeltaStep, m: int, h: int, q: jax.Array, k: jax.Array, state: jax.Array):
    """What `tpu_forward.Forward.by_position` gives, in phases."""
    dtype, x = q.dtype, Decays(step.load("logs", m, h), step.masks(m))
    overlap, p = yield from scores(step, x, q, k, overlaps=True)
    seen = product(jnp.concatenate([k * x.read, q * x.read]).astype(dtype), state.astype(dtype), 1, 0)
    return overlap, p.astype(dtype), seen, x.write, step.spread(x.kept, state.shape[1])


class Chunk:
    """What `tpu_backward.ByPosition` is where channels have their own decays."""

    def __init__(self, step: DeltaStep, m: int, h: int):
        self.m, self.h, self.k = m, h, step.load("k", m, h)
        decays = Decays(step.load("logs", m, h), step.masks(m))
        self.joined = Pairs(step, decays, self.k)
        self.read, self.write = decays.read, decays.write
        self.carry = step.spread(decays.kept, step.plan.shape[4])

    def seen(self, state: jax.Array) -> jax.Array:
        return product((self.k * self.read).astype(self.k.dtype), state, 1, 0)

    def pairs(self, q: jax.Array):
        return self.joined.scores(q, overlaps=True)

    def gradients(self, q: jax.Array, own: jax.Array, slopes: jax.Array, turned: jax.Array):
        (dq, dk_read), dk_written = yield from self.joined.gradients(q, own, slopes, turned)
        return dq, dk_read, dk_written

    def store_decay(self, passed: jax.Array, written: jax.Array, kept: jax.Array) -> None:
        self.joined.store_decay(self.m, self.h, passed, written, kept)
