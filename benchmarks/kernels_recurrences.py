"""Recurrences in `benchmarks.kernels`: cases, and who computes them: our kernels, XLA, and fla's Triton kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

PEERS = ("ours", "xla", "fla")


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """One recurrence: shapes as in `kernels_pallas.linear_recurrence` or, without decay, `.flow_attention`.

    Attributes:
      op: linear_recurrence or flow_attention.
      decay: none, constant (a number per head), or data (one per position and head).
    """

    name: str
    op: str
    B: int
    T: int
    H: int
    d: int
    e: int
    decay: str = "none"

    peers = PEERS

    @property
    def family(self) -> tuple[Any, ...]:
        """What a case that is wrong says of others."""
        return self.op, self.d, self.e

    def tiny(self) -> Recurrence:
        """The same in small, to try a program where it would take too long."""
        return dataclasses.replace(self, B=1, T=72, H=1)

    def flops(self, backward: bool) -> float:
        """Of the products of a chunk of 64, forward, or forward and backward by 3 d + 2 e and five states."""
        pairs, states = 64 * (self.d + self.e), 2 * self.d * self.e
        if backward:
            pairs, states = pairs + 64 * (3 * self.d + 2 * self.e), states + 5 * self.d * self.e
        return 2.0 * self.B * self.T * self.H * (pairs + states)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of q, k, u, do and what there is of log_decay."""
        positions = self.B, self.T, self.H
        keys, values = (*positions, self.d), (*positions, self.e)
        decay = {"none": {}, "constant": {"log_decay": (self.H,)}, "data": {"log_decay": positions}}[self.decay]
        return {"q": keys, "k": keys, "u": values, "do": values} | decay

    def arrays(self) -> dict[str, np.ndarray]:
        """float32, the same whenever and by whomever they are asked for; features of flow attention are positive."""
        rng = np.random.default_rng(0)
        found = {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes().items()}
        if self.op == "flow_attention":
            found |= {name: 1 / (1 + np.exp(-found[name])) for name in "qk"}
        if self.decay != "none":
            found["log_decay"] = -np.abs(found["log_decay"]) / 10
        return found


# Every width for which blocks are shipped, at a length that fills no chunk.
PARITY = [
    *(Recurrence(f"linear {d}/{e} {decay}", "linear_recurrence", 2, 1000, 4, d, e, decay)
      for d, e, decay in ((64, 64, "constant"), (128, 128, "data"), (128, 129, "none"), (256, 256, "data"))),
    *(Recurrence(f"flow {d}/{d}", "flow_attention", 2, 1000, 4, d, d) for d in (64, 128)),
]  # fmt: skip
TIMED = [
    Recurrence("linear 128 data", "linear_recurrence", 4, 8192, 16, 128, 128, "data"),
    Recurrence("linear 128 constant", "linear_recurrence", 4, 8192, 16, 128, 128, "constant"),
    Recurrence("linear 64 data", "linear_recurrence", 4, 8192, 32, 64, 64, "data"),
    Recurrence("linear 128/129", "linear_recurrence", 4, 8192, 16, 128, 129),
    Recurrence("linear 256 data", "linear_recurrence", 4, 8192, 8, 256, 256, "data"),
    Recurrence("flow 128", "flow_attention", 4, 8192, 16, 128, 128),
]


def in_jax(case: Recurrence, impl: str) -> Callable[..., Any]:
    """o as a function of the arrays but do, by an implementation of the op in attnlab."""
    if case.op == "flow_attention":
        from attnlab.ops.flow_attention import flow_attention
        from attnlab.ops.flow_definition import FlowRule

        return lambda q, k, u: flow_attention(q, k, u, FlowRule(), causal=True, impl=impl).o
    from attnlab.ops.linear_recurrence import linear_recurrence

    return lambda q, k, u, log_decay=None: linear_recurrence(q, k, u, log_decay=log_decay, impl=impl)[0]


def in_fla(case: Recurrence) -> Callable[..., Any] | str:
    """As `in_jax`, of torch tensors, by the kernels of flash-linear-attention; or why not."""
    if case.op != "linear_recurrence":
        return f"fla has no {case.op}"
    if case.decay == "none":
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, u: chunk_linear_attn(q, k, u, scale=1.0, normalize=False)[0]
    from fla.ops.simple_gla import chunk_simple_gla

    if case.decay == "constant":
        return lambda q, k, u, log_decay: chunk_simple_gla(q, k, u, g_gamma=log_decay, scale=1.0)[0]
    return lambda q, k, u, log_decay: chunk_simple_gla(q, k, u, g=log_decay, scale=1.0)[0]
