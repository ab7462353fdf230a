"""The kernels: a step of the grid has all heads of a block of positions, which share sines and cosines.

Arrays are [B, H, T, d], R positions a block. A channel's partner is the other of its pair.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuning
from kernels_pallas.mosaic import Slots
from kernels_pallas.rotary.plan import Plan

_F32 = jnp.float32
_SUBLANES = 8


class _Step:
    """A block of positions.

    Attributes:
      cos: [R, d], of each channel's angle; 1 of channels that are not turned.
      sin: [R, d], with the sign by which a channel takes its partner.
    """

    def __init__(self, plan: Plan, r: dict[str, Any]):
        self.plan, self.r = plan, r
        self.half, d = plan.width // 2, plan.shape[3]
        self.lane = lax.broadcasted_iota(jnp.int32, (plan.rows, d), 1)
        table = r["table"][0]
        first, turned = self.lane < self.half, self.lane < plan.width
        partner = self.partner(table)  # sines at the first channels of pairs, cosines at the second
        self.cos = jnp.where(turned, jnp.where(first, table, partner), 1)
        self.sin = jnp.where(turned, jnp.where(first, -partner, table), 0)

    def partner(self, x: jax.Array) -> jax.Array:
        """What the partners of channels have."""
        d = x.shape[1]
        behind = pltpu.roll(x, self.half, 1)
        if self.plan.width == d:
            return behind
        return jnp.where(self.lane < self.half, pltpu.roll(x, d - self.half, 1), behind)

    def deviation(self, x: jax.Array) -> jax.Array:
        """1 / sqrt(mean square), [R, 1]."""
        return lax.rsqrt(self.mean(x * x) + self.plan.epsilon)

    def mean(self, x: jax.Array) -> jax.Array:
        """Over channels."""
        return jnp.sum(x, axis=1, keepdims=True) * (1.0 / x.shape[1])


def _forward_kernel(plan: Plan, back: bool, names: tuple[str, ...], *refs: Any) -> None:
    r = dict(zip(names, refs, strict=True))
    step = _Step(plan, r)
    cos, sin = step.cos, -step.sin if back else step.sin
    if plan.norm:  # its scale is in them, once for all heads
        cos, sin = cos * r["scale"][0:1], sin * r["scale"][1:2]
    for h in range(plan.shape[2]):
        x = r["x"][0, h].astype(_F32)
        y = x * cos + step.partner(x) * sin
        r["y"][0, h] = (y * step.deviation(x) if plan.norm else y).astype(r["y"].dtype)


def _backward_kernel(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    r = dict(zip(names, refs, strict=True))
    step, scale, total = _Step(plan, r), r["scale"][0:1], None
    for h in range(plan.shape[2]):
        x, g = (r[name][0, h].astype(_F32) for name in ("x", "dy"))
        dz = g * step.cos - step.partner(g) * step.sin  # turned back: the gradient behind the norm
        weighted, inverse = dz * x, step.deviation(x)
        passed = step.mean(weighted * scale) * (inverse * inverse)
        r["dx"][0, h] = ((dz * scale - x * passed) * inverse).astype(r["dx"].dtype)
        own = weighted * inverse
        total = own if total is None else total + own
    if plan.shape[1] % plan.rows:  # behind the last position there is anything
        left = plan.shape[1] - pl.program_id(1) * plan.rows
        total = jnp.where(lax.broadcasted_iota(jnp.int32, total.shape, 0) < left, total, 0)
    r["dscale"][0, 0] = jnp.sum(total.reshape(-1, _SUBLANES, total.shape[1]), axis=0)


class _Blocks(Slots):
    """The arrays of a call."""

    def __init__(self, plan: Plan):
        super().__init__()
        B, T, H, d = plan.shape
        self.plan, self.steps = plan, -(-T // plan.rows)
        self.heads = pl.BlockSpec((1, H, plan.rows, d), lambda b, n: (b, 0, n, 0))

    def shared(self, table: jax.Array, scale: jax.Array | None) -> None:
        """What all heads read: the scale as channels have it, and as their partners do."""
        d, half = self.plan.shape[3], self.plan.width // 2
        self.input("table", table, pl.BlockSpec((1, self.plan.rows, d), lambda b, n: (b, n, 0)))
        if scale is not None:
            first, second, rest = jnp.split(scale, [half, 2 * half])
            both = jnp.stack([scale, jnp.concatenate([second, first, rest])])
            self.input("scale", both, pl.BlockSpec((2, d), lambda b, n: (0, 0)))

    def run(self, kernel: Any, direction: str) -> dict[str, jax.Array]:
        moved = sum(x.size * x.dtype.itemsize for x, _ in (*self.inputs.values(), *self.outputs.values()))
        return self.call(
            functools.partial(kernel, self.names()),
            grid=(self.plan.shape[0], self.steps),
            semantics=("parallel", "parallel"),
            name=f"rotary_{direction}",
            scope="rotary",
            vmem=tuning.vmem_limit(self.plan.kind),
            interpret=self.plan.interpret,
            cost=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        )


def forward(plan: Plan, x: jax.Array, table: jax.Array, scale: jax.Array | None, *, back: bool = False) -> jax.Array:
    """See `kernels_pallas.rotary.rotary`, x [B, H, T, d]; `back`: turned the other way."""
    blocks = _Blocks(plan)
    blocks.input("x", x, blocks.heads)
    blocks.shared(table, scale)
    blocks.output("y", x.shape, x.dtype, blocks.heads)
    kernel = functools.partial(_forward_kernel, plan, back)
    return blocks.run(kernel, "back" if back else "forward")["y"]


def backward(plan: Plan, x, dy, table, scale) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and of the scale."""
    blocks, (B, _, _, d) = _Blocks(plan), plan.shape
    blocks.input("x", x, blocks.heads)
    blocks.input("dy", dy, blocks.heads)
    blocks.shared(table, scale)
    blocks.output("dx", x.shape, x.dtype, blocks.heads)
    sums = pl.BlockSpec((1, 1, _SUBLANES, d), lambda b, n: (b, n, 0, 0))
    blocks.output("dscale", (B, blocks.steps, _SUBLANES, d), _F32, sums)
    out = blocks.run(functools.partial(_backward_kernel, plan), "backward")
    return out["dx"], jnp.sum(out["dscale"], axis=(0, 1, 2))
