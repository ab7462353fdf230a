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
from attnlab.ops.dispatch import Implementation, choose
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
from attnlab.parallel import partition


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

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.sinks} S{self.sources} H{self.heads} d{self.width}/{self.value_width}"
        features = [name for name in ("causal", "packed") if getattr(self, name)]
        return " ".join([shape, f"C{self.chunk}", self.dtype, *features])


_CAUSAL = {"definition": Implementation(causal_definition), "chunked": Implementation(causal_chunked)}
_BIDIRECTIONAL = {
    "definition": Implementation(bidirectional_definition),
    "chunked": Implementation(bidirectional_linear),
}
IMPLEMENTATIONS = tuple(_CAUSAL)
_PREFERENCE = ("chunked",)


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
      impl: "auto", or a name in `IMPLEMENTATIONS`.

    Returns:
      FlowOutput: o_BTHe in the dtype of v, and sums in fp32 (fp64 for fp64 inputs).

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    _check_shapes(q_BTHd, k_BSHd, v_BSHe, causal, documents, state, chunk)
    B, T, H, d = q_BTHd.shape
    S, e = v_BSHe.shape[1], v_BSHe.shape[3]
    spec = FlowSpec(B, T, S, H, d, e, str(v_BSHe.dtype), causal, documents is not None, chunk)
    chosen = choose("flow_attention", impl, _CAUSAL if causal else _BIDIRECTIONAL, spec, _PREFERENCE)
    wide = jnp.promote_types(v_BSHe.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (q_BTHd, k_BSHd, v_BSHe))
    streamed = (state,) if causal else ()
    run = lambda q, k, v, documents: chosen.run(q, k, v, documents, *streamed, rule, chunk)
    local = chosen.run is causal_chunked and state is None
    out = _on_devices(run, q, k, v, documents, rule) if local else run(q, k, v, documents)
    return out._replace(o=out.o.astype(v_BSHe.dtype))


def _on_devices(run, q, k, v, documents, rule: FlowRule) -> FlowOutput:
    """`run` on each device's own batch, heads and positions."""
    B, T, H, d = q.shape
    rows = ("batch", "seq", "heads", None)
    like = empty_state(rule, B, H, d, v.shape[3], q.dtype)
    states, kind = jax.tree.flatten(like)
    has_outgoing = rule.competition

    def on_device(*arrays):
        out = run(*arrays)
        return (out.o, *([out.outgoing] if has_outgoing else []), *jax.tree.leaves(out.state))

    of_states = [("batch", *("heads", None, None)[: x.ndim - 1]) for x in states]
    out_axes = [rows, *([rows[:3]] if has_outgoing else []), *of_states]
    o, *rest = partition.local(on_device, (q, k, v, documents), (rows, rows, rows, rows[:2]), out_axes)
    outgoing = rest.pop(0) if has_outgoing else None
    return FlowOutput(o, jax.tree.unflatten(kind, rest), outgoing)


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
