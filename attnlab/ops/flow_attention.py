"""Flow attention: linear attention in which sinks (queries) and sources (keys) compete for a conserved flow.

Wu et al. 2022, Flowformer (arXiv:2202.06258), section 3; the causal form is that of the authors' code, where every sum
runs over the positions so far. It is computed in chunks and carries a state whose size does not grow with the length.

Shapes: `B` batch, `T` sinks, `S` sources, `H` heads, `d` key width, `e` value width, `N` chunks, `C` positions in a
chunk.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import flow_kernel
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.flow_bidirectional import bidirectional_linear
from attnlab.ops.flow_causal import causal_chunked
from attnlab.ops.flow_definition import (
    FlowOutput,
    FlowRule,
    FlowState,
    bidirectional_definition,
    causal_definition,
    empty_state,
)
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class FlowSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `flow_attention`."""

    batch: int
    sinks: int
    sources: int
    heads: int
    width: int
    value_width: int
    dtype: str
    causal: bool
    packed: bool
    chunk: int
    rule: FlowRule
    split: bool  # positions, over devices

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.sinks} S{self.sources} H{self.heads} d{self.width}/{self.value_width}"
        features = [name for name in ("causal", "packed", "split") if getattr(self, name)]
        return " ".join([shape, f"C{self.chunk}", self.dtype, *features])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, q, k, v, documents, state, *, rule: FlowRule, causal: bool, chunk: int
    ) -> FlowSpec:
        """Of the arrays of a device."""
        B, T, H, d = q.shape
        return cls(
            B, T, k.shape[1], H, d, v.shape[3], str(v.dtype), causal, documents is not None, chunk, rule,
            exchange is not None,
        )  # fmt: skip


def _widened(q, k, v) -> tuple[jax.Array, ...]:
    """In the dtype of sums."""
    wide = jnp.promote_types(v.dtype, jnp.float32)
    return tuple(x.astype(wide) for x in (q, k, v))


def definition(q, k, v, documents, state, *, rule: FlowRule, causal: bool, chunk: int) -> FlowOutput:
    """The formulas with all pairs."""
    wide = _widened(q, k, v)
    if causal:
        out = causal_definition(*wide, documents, state, rule)
    else:
        out = bidirectional_definition(*wide, documents, rule)
    return out._replace(o=out.o.astype(v.dtype))


def chunked(q, k, v, documents, state, *, rule: FlowRule, causal: bool, chunk: int, exchange=None) -> FlowOutput:
    """In linear time; where positions are split over devices, by sums that these exchange."""
    wide = _widened(q, k, v)
    if causal:
        out = causal_chunked(*wide, documents, state, rule, chunk, exchange)
    else:
        out = bidirectional_linear(*wide, documents, rule, chunk, exchange)
    return out._replace(o=out.o.astype(v.dtype))


def _chunked_over_devices(exchange: SequenceParallel, *arrays, **options) -> FlowOutput:
    return chunked(*arrays, exchange=exchange, **options)


FLOW_ATTENTION = Op(
    "flow_attention",
    FlowSpec.of,
    {
        "definition": Implementation(definition),
        "chunked": Implementation(chunked, split=_chunked_over_devices),
        "pallas": Implementation(
            flow_kernel.attention,
            supports=flow_kernel.unsupported,
            worth=flow_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=flow_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "chunked"),
)


def flow_attention(
    q_BTHd: jax.Array,
    k_BSHd: jax.Array,
    v_BSHe: jax.Array,
    rule: FlowRule,
    *,
    causal: bool,
    documents: jax.Array | None = None,
    state: FlowState | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> FlowOutput:
    """Flow attention of features that are at least 0; the formulas are in the definitions' docstrings.

    Args:
      q_BTHd, k_BSHd, v_BSHe: features of sinks and sources, and values.
      rule: what is computed.
      causal: whether a position sees only itself and those before; then T == S.
      documents: [B, T] of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state: before the first position (causal only), for positions of document 0; None: nothing.
      chunk: positions in a chunk, changes only time and memory.
      impl: "auto", or a name in `FLOW_ATTENTION.table`.

    Returns:
      FlowOutput: o_BTHe in the dtype of v, and sums in fp32 (fp64 for fp64 inputs).

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    _check_shapes(q_BTHd, k_BSHd, v_BSHe, causal, documents, state, chunk)
    # Positions of a stream stay whole: its state stands before all of them.
    seq = "seq" if state is None else None
    rows = ("batch", seq, "heads", None)
    of_state = lambda x: ("batch", *("heads", None, None)[: x.ndim - 1])
    after = []
    if causal:
        B, _, H, d = q_BTHd.shape
        like = jax.eval_shape(lambda: empty_state(rule, B, H, d, v_BSHe.shape[3], q_BTHd.dtype))
        after = map(of_state, jax.tree.leaves(like))
    return FLOW_ATTENTION(
        q_BTHd, k_BSHd, v_BSHe, documents, state,
        axes=(rows, rows, rows, rows[:2], jax.tree.map(of_state, state)),
        out_axes=[rows, *after, *([rows[:3]] if rule.competition else [])],
        impl=impl, rule=rule, causal=causal, chunk=chunk,
    )  # fmt: skip


def _check_shapes(q, k, v, causal: bool, documents, state, chunk: int) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"flow_attention: {message}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    fit = q.ndim == k.ndim == v.ndim == 4 and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3]
    fit = fit and k.shape[:3] == v.shape[:3]
    need(fit, f"{shapes} do not fit; expected q [B, T, H, d], k [B, S, H, d], v [B, S, H, e]")
    same = not causal and documents is None
    need(same or q.shape[1] == k.shape[1], f"{shapes}; T and S may differ only where nothing is causal or packed")
    need(documents is None or documents.shape == q.shape[:2], f"documents of shape {getattr(documents, 'shape', None)}")
    need(causal or state is None, "a state needs causal=True")
    need(chunk >= 1, f"chunk={chunk} is not allowed; allowed: 1 or more")


def matrix_flops(rule: FlowRule, causal: bool, length: int, width: int, value_width: int, chunk: int) -> float:
    """Forward FLOPs per token and head of the matrix products of the chunked form on unpacked self-attention."""
    d, e = width, value_width
    twice = rule.allocation + rule.competition  # flows of weighted sums
    flows = 1 + rule.allocation + twice
    if not causal:
        return 2.0 * d * (flows + twice) + 4.0 * d * e
    C = min(chunk, length)
    padded = -(-length // C) * C / length
    several = length > C
    recurrence = 2 * C * (d + e) + 2 * d * e + several * 2 * d * e
    vectors = twice + (rule.competition and rule.clip is not None)  # each a chunk's pairs times a vector
    return float(padded * (recurrence + 2 * C * d + 2 * C * vectors + several * 2 * d * flows))
