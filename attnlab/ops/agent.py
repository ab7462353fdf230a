"""Agent attention as ops: causal, with a stream's state, and both ways, for sequences, packed documents and images."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import agent_attention as both_ways
from attnlab.ops import agent_kernel, attention_flash
from attnlab.ops.agent_causal import Averages, fixed_agent_attention
from attnlab.ops.agent_refreshed import Stream, definition_refreshed_agents, refreshed_agent_attention
from attnlab.ops.attention_frame import AttentionSpec
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.masks import Mask
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class AgentSpec:
    """The static facts by which an implementation is chosen. Lengths as in the ops."""

    batch: int
    positions: int
    heads: int
    width: int
    value_width: int
    agents: int
    dtype: str
    packed: bool
    features: tuple[str, ...] = ()
    chunk: int | None = None  # between refreshes of agents that are made anew

    def __str__(self) -> str:
        width = f"d{self.width}" if self.width == self.value_width else f"d{self.width}/{self.value_width}"
        shape = f"B{self.batch} T{self.positions} H{self.heads} {width} m{self.agents} {self.dtype}"
        chunk = [] if self.chunk is None else [f"C{self.chunk}"]
        return " ".join([shape, *(["packed"] if self.packed else []), *self.features, *chunk])


def _causal_spec(
    exchange: SequenceParallel | None, q, k, v, agents_Hmd, documents, before, *, refreshed: bool, chunk: int
) -> AgentSpec:
    features = ["causal", "refreshed" if refreshed else "fixed", *([] if before is None else ["stream"])]
    return AgentSpec(
        *q.shape, v.shape[3], agents_Hmd.shape[1], str(q.dtype), documents is not None, tuple(features),
        chunk if refreshed else None,
    )  # fmt: skip


def _no_stream(spec: AgentSpec) -> str | None:
    return "it needs the positions before" if "stream" in spec.features else None


def causal_definition(q, k, v, agents_Hmd, documents, before, *, refreshed: bool, chunk: int):
    """All pairs of positions."""
    agents = agents_Hmd.astype(q.dtype)
    documents = jnp.zeros(q.shape[:2], jnp.int32) if documents is None else documents
    own = definition_refreshed_agents(q, agents, documents, chunk) if refreshed else agents[None, None]
    t = jnp.arange(q.shape[1])
    visible = (documents[:, :, None] == documents[:, None]) & (t[:, None] >= t)
    return both_ways.definition(q, k, v, own, visible), None


def causal_chunked(q, k, v, agents_Hmd, documents, before, *, refreshed: bool, chunk: int):
    """In linear time, and where agents are refreshed one pass over the keys for each chunk."""
    agents = agents_Hmd.astype(q.dtype)
    if refreshed:
        return refreshed_agent_attention(q, k, v, agents, documents, before, chunk=chunk)
    o, after = fixed_agent_attention(q, k, v, agents[None], documents, before, chunk=chunk)
    return o, None if before is None else after


def _causal_chunked_over_devices(exchange, q, k, v, agents_Hmd, documents, before, *, refreshed: bool, chunk: int):
    agents = agents_Hmd.astype(q.dtype)
    if not refreshed:
        return fixed_agent_attention(q, k, v, agents[None], documents, chunk=chunk, exchange=exchange)[0], None
    q, k, v = map(exchange.all_gather, (q, k, v))
    documents = None if documents is None else exchange.all_gather(documents)
    return exchange.own(refreshed_agent_attention(q, k, v, agents, documents, chunk=chunk)[0]), None


CAUSAL_AGENT_ATTENTION = Op(
    "causal_agent_attention",
    _causal_spec,
    {
        "definition": Implementation(causal_definition, _no_stream),
        "chunked": Implementation(causal_chunked, split=_causal_chunked_over_devices),
        "pallas": Implementation(
            agent_kernel.run,
            agent_kernel.unsupported,
            agent_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            split=agent_kernel.over_devices,
            kernel_flops=agent_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "chunked"),
)


def causal_agent_attention(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    agents_Hmd: jax.Array,
    documents_BT: jax.Array | None = None,
    before: Averages | Stream | None = None,
    *,
    refreshed: bool,
    chunk: int,
    impl: str = "auto",
) -> tuple[jax.Array, Averages | Stream | None]:
    """Causal agent attention.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values.
      agents_Hmd: the agents, or those of a document's first chunk.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      before: what a stream's earlier positions left: `Averages` of fixed agents, `Stream` of refreshed ones.
      refreshed: whether agents are made anew for every chunk of a document (`refreshed_agent_attention`).
      chunk: positions computed together (the kernel has its own), or between refreshes.
      impl: "auto", or a name in `CAUSAL_AGENT_ATTENTION.table`.

    Returns:
      o_BTHe in the dtype of q, and what later positions of a stream need; None where `before` is.
    """
    # A stream's positions and heads stay whole: its cache has heads and rows in one axis.
    seq, heads = ("seq", "heads") if before is None else (None, None)
    rows = ("batch", seq, heads, None)
    of_stream = lambda x: ("batch", None, None, None)[: x.ndim]
    streamed = jax.tree.map(of_stream, before)
    after = [of_stream(x) for x in jax.tree.leaves(before)]
    return CAUSAL_AGENT_ATTENTION(
        q_BTHd, k_BTHd, v_BTHe, agents_Hmd, documents_BT, before,
        axes=(rows, rows, rows, (heads, None, None), rows[:2], streamed), out_axes=[rows, *after],
        impl=impl, refreshed=refreshed, chunk=chunk,
    )  # fmt: skip


def _both_ways_spec(exchange, q, k, v, segments, bias_in, bias_out, *, agents: int, grid: Any) -> AgentSpec:
    features = [f"grid={grid[0]}x{grid[1]}"] if grid is not None else []
    features += ["biases"] if bias_in is not None else []
    return AgentSpec(*q.shape, v.shape[3], agents, str(q.dtype), segments is not None, tuple(features))


def both_ways_definition(q, k, v, segments, bias_in, bias_out, *, agents: int, grid: tuple[int, int] | None):
    """All pairs of positions."""
    segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments
    own, visible, used = both_ways.definition_pooled_agents(q, segments, agents)
    if grid is not None:
        own, used = both_ways.definition_grid_agents(q, grid, agents), None
    return both_ways.definition(q, k, v, own, visible, used, bias_in, bias_out)


def both_ways_linear(q, k, v, segments, bias_in, bias_out, *, agents: int, grid: tuple[int, int] | None):
    """In linear time."""
    if segments is not None:
        return both_ways.packed_agent_attention(q, k, v, segments, agents)
    return both_ways.agent_attention(q, k, v, _pooled(q, grid, agents), bias_in, bias_out)


def both_ways_flash(
    q, k, v, segments, bias_in, bias_out, *, agents: int, grid: tuple[int, int] | None, interpret: bool = False
):
    """Both softmaxes by our kernels: few queries over all keys, then all queries over few keys.

    One kernel of both would move as much: keys and values are read before the first output, then queries. With 128
    agents, or as many with padding, either attention's forward takes fewer cycles than its bytes (docs/kernels.md).
    """
    attend = functools.partial(attention_flash.attention, scale=q.shape[3] ** -0.5, soft_cap=None, interpret=interpret)
    if segments is not None:
        return both_ways.packed_agent_attention(q, k, v, segments, agents, attend)
    own = _pooled(q, grid, agents)
    return attend(q, own, attend(own, k, v, Mask()), Mask())


def _pooled(q, grid: tuple[int, int] | None, agents: int):
    if grid is not None:
        return both_ways.grid_agents(q, grid, agents)
    return both_ways.adaptive_pool(q, 1, min(agents, q.shape[1]))


def _two_attentions(spec: AgentSpec) -> tuple[AttentionSpec, AttentionSpec]:
    """That of the agents, and that of the queries."""
    T = spec.positions
    few = T if spec.packed else min(spec.agents, T)
    of = lambda queries, keys: AttentionSpec(
        spec.batch, queries, keys, spec.heads, spec.heads, spec.width, spec.value_width, spec.dtype,
        causal=False, window=None, intervals=spec.packed, soft_cap=False, sinks=False,
    )  # fmt: skip
    return of(few, T), of(T, few)


def _no_flash(spec: AgentSpec) -> str | None:
    if "biases" in spec.features:
        return "its logits take no bias of a query and a key"
    return attention_flash.unsupported(_two_attentions(spec)[0])


def _flash_pays(spec: AgentSpec) -> bool:
    """Not where agents are fewer than a tile has rows; documents are two attentions in the other form, too."""
    return not spec.packed and all(map(attention_flash.worth, _two_attentions(spec)))


def _flash_flops(spec: AgentSpec) -> dict[str, float]:
    """Of a run of each kernel: the mean over both attentions."""
    both = [attention_flash.kernel_flops(attention) for attention in _two_attentions(spec)]
    return {name: sum(flops[name] for flops in both) / 2 for name in both[0]}


AGENT_ATTENTION = Op(
    "agent_attention",
    _both_ways_spec,
    {
        "definition": Implementation(both_ways_definition),
        "chunked": Implementation(both_ways_linear),
        "flash": Implementation(
            both_ways_flash,
            _no_flash,
            worth=_flash_pays,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=_flash_flops,
        ),
    },
    preference=("flash", "chunked"),
)


def pooled_agent_attention(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    segments_BT: jax.Array | None = None,
    bias_in_HmT: jax.Array | None = None,
    bias_out_HmT: jax.Array | None = None,
    *,
    agents: int,
    grid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Agent attention without a causal order, by agents pooled from the queries: o_BTHe in the dtype of q.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values.
      segments_BT: ids of packed documents, 0 for padding; None: one document a row. Not with a grid.
      bias_in_HmT, bias_out_HmT: added to the logits of agents over keys and of queries over agents; None: nothing.
      agents: m, most agents of a document; a square number where there is a grid.
      grid: rows and columns of the image that the last positions are; None: there is none.
      impl: "auto", or a name in `AGENT_ATTENTION.table`.
    """
    rows, bias = ("batch", "seq", "heads", None), ("heads", None, None)
    return AGENT_ATTENTION(
        q_BTHd, k_BTHd, v_BTHe, segments_BT, bias_in_HmT, bias_out_HmT,
        axes=(rows, rows, rows, rows[:2], bias, bias), out_axes=[rows], impl=impl, agents=agents, grid=grid,
    )  # fmt: skip
