"""Recurrences in `benchmarks.kernels`, local linear attention, Parallax and cross-entropy: cases, and who computes
them: our kernels, XLA, and fla's Triton kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

PEERS = ("ours", "xla", "fla")
AGENTS = 16


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """One recurrence: shapes as in `kernels_pallas.linear_recurrence` or, without decay, `.flow_attention`.

    Attributes:
      op: linear_recurrence, delta_rule (decay: data), neural_memory (a matrix; decay: data), flow_attention,
        agent_attention by `AGENTS` agents, local_linear and parallax (causal), or cross_entropy (of T rows of width d
        over e columns).
      decay: none, constant (a number per head), or data (one per position and head).
      packed: rows are documents T / 8 long.
      chunk, norm: of the neural memory.
    """

    name: str
    op: str
    B: int
    T: int
    H: int
    d: int
    e: int
    decay: str = "none"
    packed: bool = False
    chunk: int = 64
    norm: bool = False

    peers = PEERS

    @property
    def family(self) -> tuple[Any, ...]:
        """What a case that is wrong says of others."""
        return self.op, self.d, self.e, self.norm

    def tiny(self) -> Recurrence:
        """The same in small, to try a program where it would take too long."""
        if self.op == "cross_entropy":
            return dataclasses.replace(self, T=72, d=64, e=300)
        return dataclasses.replace(self, B=1, T=72, H=1)

    def flops(self, backward: bool) -> float:
        """Of the products of a chunk of 64, forward, or forward and backward by 3 d + 2 e and five states; of the delta
        rule, of reading, writing and asking a state once a position, and twice as much backward; of agent attention, of
        logits, sums, pairs and averages, and in the backward of their gradients; of local linear attention, of 16
        iterations in each solve; of Parallax, of four products forward and eight backward; of cross-entropy, of each
        logit once."""
        if self.op == "cross_entropy":
            return (6.0 if backward else 2.0) * self.T * self.d * self.e
        if self.op == "local_linear":
            widths = 35 * self.d + self.e + (41 * self.d + 2 * self.e if backward else 0)
            return self.B * self.H * self.T * (self.T + 1.0) * widths
        if self.op == "parallax":
            widths = 2 * self.d + 2 * self.e + backward * (6 * self.d + 2 * self.e)
            return self.B * self.H * self.T * (self.T + 1.0) * widths
        if self.op == "delta_rule":
            return (18.0 if backward else 6.0) * self.B * self.T * self.H * self.d * self.e
        if self.op == "neural_memory":  # W for keys and queries, S for queries, both written; thrice as many backward
            return (40.0 if backward else 10.0) * self.B * self.T * self.H * self.d * self.d
        if self.op == "agent_attention":
            d, e, m = self.d, self.e, AGENTS * (1.0 + 2.5 * backward)
            pairs = 2 * AGENTS * d + 64 * e + backward * (6 * AGENTS * d + 2 * 64 * e)
            return 2.0 * self.B * self.T * self.H * (pairs + 2 * m * (64 + e))
        pairs, states = 64 * (self.d + self.e), 2 * self.d * self.e
        if backward:
            pairs, states = pairs + 64 * (3 * self.d + 2 * self.e), states + 5 * self.d * self.e
        return 2.0 * self.B * self.T * self.H * (pairs + states)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of q, k, u, do and what there is of log_decay, beta, agents and probe."""
        if self.op == "cross_entropy":
            return {"q": (self.T, self.d), "k": (self.d, self.e), "do": (self.T,)}
        positions = self.B, self.T, self.H
        keys, values = (*positions, self.d), (*positions, self.e)
        decay = {"none": {}, "constant": {"log_decay": (self.H,)}, "data": {"log_decay": positions}}[self.decay]
        more = {"delta_rule": {"beta": positions}, "neural_memory": {"log_eta": positions, "theta": positions}}
        more |= {"agent_attention": {"agents": (self.H, AGENTS, self.d)}, "parallax": {"probe": keys}}
        return {"q": keys, "k": keys, "u": values, "do": values} | decay | more.get(self.op, {})

    def documents(self) -> np.ndarray | None:
        """The number of each position's document, int32 [B, T]."""
        number = np.arange(self.T, dtype=np.int32) // max(self.T // 8, 1)
        return np.broadcast_to(number, (self.B, self.T)) if self.packed else None

    def arrays(self) -> dict[str, np.ndarray]:
        """float32, the same whenever and by whomever they are asked for; features of flow attention are positive."""
        rng = np.random.default_rng(0)
        found = {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes().items()}
        if self.op == "flow_attention":
            found |= {name: 1 / (1 + np.exp(-found[name])) for name in "qk"}
        if self.op in ("delta_rule", "neural_memory"):
            found |= {name: found[name] / np.linalg.norm(found[name], axis=-1, keepdims=True) for name in "qk"}
        if self.op == "neural_memory":  # steps of a chunk add up to 1 at most
            found["theta"] = 1 / (1 + np.exp(-found["theta"])) / (2 * self.chunk)
            found["log_eta"] = -np.abs(found["log_eta"]) - 0.5
        if self.op == "delta_rule":
            found["beta"] = 1 / (1 + np.exp(-found["beta"]))
        if self.decay != "none":
            found["log_decay"] = -np.abs(found["log_decay"]) / 10
        return found


# Every width for which blocks are shipped, at a length that fills no chunk.
PARITY = [
    *(Recurrence(f"linear {d}/{e} {decay}", "linear_recurrence", 2, 1000, 4, d, e, decay)
      for d, e, decay in ((64, 64, "constant"), (128, 128, "data"), (128, 129, "none"), (256, 256, "data"))),
    *(Recurrence(f"flow {d}/{d}", "flow_attention", 2, 1000, 4, d, d) for d in (64, 128)),
    *(Recurrence(f"agent {d}/{d} packed", "agent_attention", 2, 1000, 4, d, d, packed=True) for d in (64, 128)),
    *(Recurrence(f"delta rule {d}/{e} packed", "delta_rule", 2, 1000, 4, d, e, "data", True)
      for d, e in ((64, 64), (128, 128), (128, 256))),
    *(Recurrence(f"memory {d} chunk {chunk} packed", "neural_memory", 2, 1000, 4, d, d, "data", True, chunk)
      for d, chunk in ((64, 16), (64, 64), (128, 16), (128, 64))),
    Recurrence("memory 64 chunk 16 norm packed", "neural_memory", 2, 1000, 4, 64, 64, "data", True, 16, True),
    *(Recurrence(f"local linear {d}/{d}", "local_linear", 2, 1000, 4, d, d) for d in (64, 128)),
    *(Recurrence(f"parallax {d}/{d}", "parallax", 2, 1000, 4, d, d) for d in (64, 128)),
    Recurrence("cross-entropy 1000/20000", "cross_entropy", 1, 1000, 1, 1000, 20000),
]  # fmt: skip
TIMED = [
    Recurrence("linear 128 data", "linear_recurrence", 4, 8192, 16, 128, 128, "data"),
    Recurrence("linear 128 constant", "linear_recurrence", 4, 8192, 16, 128, 128, "constant"),
    Recurrence("linear 64 data", "linear_recurrence", 4, 8192, 32, 64, 64, "data"),
    Recurrence("linear 128/129", "linear_recurrence", 4, 8192, 16, 128, 129),
    Recurrence("linear 256 data", "linear_recurrence", 4, 8192, 8, 256, 256, "data"),
    Recurrence("flow 128", "flow_attention", 4, 8192, 16, 128, 128),
    Recurrence("agent 128", "agent_attention", 4, 8192, 16, 128, 128),
    Recurrence("delta rule 128", "delta_rule", 4, 8192, 16, 128, 128, "data"),
    Recurrence("delta rule 128 packed", "delta_rule", 4, 8192, 16, 128, 128, "data", True),
    Recurrence("delta rule 64", "delta_rule", 4, 8192, 32, 64, 64, "data"),
    Recurrence("delta rule 128/256", "delta_rule", 4, 8192, 8, 128, 256, "data"),
    Recurrence("memory 64 chunk 16", "neural_memory", 4, 8192, 32, 64, 64, "data", chunk=16),
    Recurrence("memory 64 chunk 64", "neural_memory", 4, 8192, 32, 64, 64, "data"),
    Recurrence("memory 64 chunk 16 norm", "neural_memory", 4, 8192, 32, 64, 64, "data", chunk=16, norm=True),
    Recurrence("memory 128 chunk 16", "neural_memory", 4, 8192, 16, 128, 128, "data", chunk=16),
    Recurrence("memory 128 chunk 64", "neural_memory", 4, 8192, 16, 128, 128, "data"),
    Recurrence("local linear 128", "local_linear", 4, 4096, 16, 128, 128),
    Recurrence("local linear 64", "local_linear", 4, 4096, 16, 64, 64),
    Recurrence("parallax 128", "parallax", 4, 4096, 16, 128, 128),
    Recurrence("parallax 64", "parallax", 4, 4096, 16, 64, 64),
    Recurrence("cross-entropy 2048/32768", "cross_entropy", 1, 16384, 1, 2048, 32768),
    Recurrence("cross-entropy 512/32768", "cross_entropy", 1, 16384, 1, 512, 32768),
]


def in_jax(case: Recurrence, impl: str) -> Callable[..., Any]:
    """o as a function of the arrays but do, by an implementation of the op in attnlab."""
    documents = case.documents()
    if case.op == "flow_attention":
        from attnlab.ops.flow_attention import flow_attention
        from attnlab.ops.flow_definition import FlowRule

        return lambda q, k, u: flow_attention(q, k, u, FlowRule(), causal=True, documents=documents, impl=impl).o
    if case.op == "agent_attention":
        from attnlab.ops.agent import causal_agent_attention

        options = {"refreshed": False, "chunk": 64, "impl": impl}
        return lambda q, k, u, agents: causal_agent_attention(q, k, u, agents, documents, **options)[0]
    if case.op == "delta_rule":
        from attnlab.ops.delta_rule import delta_rule

        return lambda q, k, u, log_decay, beta: delta_rule(q, k, u, log_decay, beta, documents_BT=documents, impl=impl)[
            0
        ]
    if case.op == "neural_memory":
        return _memory_in_jax(case, impl)
    if case.op == "local_linear":
        from attnlab.ops import Mask
        from attnlab.ops.local_linear import local_linear

        own = {"chunked": "cg"}.get(impl, impl)
        return lambda q, k, u: local_linear(q, k, u, Mask(causal=True), 1.0, impl=own)[0]
    if case.op == "parallax":
        from attnlab.ops import Mask
        from attnlab.ops.parallax import parallax

        own = {"chunked": "xla", "pallas": "flash"}.get(impl, impl)
        return lambda q, k, u, probe: parallax(q, probe, k, u, Mask(causal=True), impl=own)
    if case.op == "cross_entropy":
        from attnlab.ops.cross_entropy import cross_entropy

        targets, ones = np.arange(case.T, dtype=np.int32) * 7919 % case.e, np.ones(case.T, np.float32)
        return lambda q, k: cross_entropy(q, k, targets, ones, impl=impl)[0].astype(q.dtype)
    from attnlab.ops.linear_recurrence import linear_recurrence

    return lambda q, k, u, log_decay=None: linear_recurrence(
        q, k, u, log_decay=log_decay, documents_BT=documents, impl=impl
    )[0]


def _memory_in_jax(case: Recurrence, impl: str) -> Callable[..., Any]:
    """A memory that is a matrix and begins with nothing; with the norm, with outputs of deviation 1 for unit keys."""
    import jax.numpy as jnp

    from attnlab.ops.documents import document_index
    from attnlab.ops.memory_frame import MemorySpec, initial_state
    from attnlab.ops.neural_memory import neural_memory

    documents = case.documents()
    documents = None if documents is None else document_index(jnp.asarray(documents))
    spec = MemorySpec(case.chunk, case.norm, (1.0,))
    matrix = case.norm * case.d**0.5 * jnp.eye(case.d)

    def run(q, k, u, log_decay, log_eta, theta):
        initial = initial_state((jnp.broadcast_to(matrix, (case.H, case.d, case.d)),), 1, True)
        y, _ = neural_memory(q, k, u, log_decay, log_eta, theta, initial, spec, documents_BT=documents, impl=impl)
        return y.astype(q.dtype)

    return run


def in_fla(case: Recurrence) -> Callable[..., Any] | str:
    """As `in_jax`, of torch tensors, by the kernels of flash-linear-attention; or why not."""
    if case.op == "delta_rule":
        return _delta_in_fla(case)
    if case.op != "linear_recurrence" or case.packed:
        return f"fla has no {case.op}{' that is packed, here' * case.packed}"
    if case.decay == "none":
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, u: chunk_linear_attn(q, k, u, scale=1.0, normalize=False)[0]
    from fla.ops.simple_gla import chunk_simple_gla

    if case.decay == "constant":
        return lambda q, k, u, log_decay: chunk_simple_gla(q, k, u, g_gamma=log_decay, scale=1.0)[0]
    return lambda q, k, u, log_decay: chunk_simple_gla(q, k, u, g=log_decay, scale=1.0)[0]


def _delta_in_fla(case: Recurrence) -> Callable[..., Any]:
    """Documents are its sequences of any length, one behind the other."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if not case.packed:
        return lambda q, k, u, log_decay, beta: chunk_gated_delta_rule(q, k, u, log_decay, beta, scale=1.0)[0]
    number = case.documents()[0]
    first = np.flatnonzero(np.diff(number, prepend=-1))
    bounds = torch.tensor([*(b * case.T + t for b in range(case.B) for t in first), case.B * case.T], device="cuda")
    joined = lambda x: x.reshape(1, case.B * case.T, *x.shape[2:])

    def run(q, k, u, log_decay, beta):
        rows = map(joined, (q, k, u, log_decay, beta))
        return chunk_gated_delta_rule(*rows, scale=1.0, cu_seqlens=bounds)[0].reshape(u.shape)

    return run
