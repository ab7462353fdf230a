"""Flow attention: linear attention whose sources compete and whose sinks are allocated by conserved flows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.base import Capabilities, HeadMixer, MixerConfig, MixerOutput, Sequence, knob, register
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.ops import flow_attention as op
from attnlab.ops.documents import document_index
from attnlab.ops.flow_definition import FlowRule, FlowState, empty_state

FEATURES = {
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda x: jax.nn.relu(x) + 1e-6,  # as in the authors' code for the Long Range Arena
}
_FORMS = ("sums", "averages")


@dataclasses.dataclass(frozen=True)
class FlowConfig(MixerConfig):
    """Knobs of flow attention."""

    heads: int = knob(4, "heads H", other=(2,))
    head_width: int | None = knob(None, "head width d; none: width / heads", other=(6,))
    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    feature: str = knob("sigmoid", f"feature map of queries and keys: {', '.join(FEATURES)}", other=("relu",))
    competition: bool = knob(True, "whether sources compete: a softmax over them scales values", other=(False,))
    allocation: bool = knob(True, "whether outputs are scaled by the sigmoid of the incoming flow", other=(False,))
    clip: float | None = knob(5.0, "competition clips outgoing flows (their mean is 1) to [-clip, clip]; none: not",
                              other=(None,))  # fmt: skip
    epsilon: float = knob(1e-6, "added to features and to their sums", other=(1e-2,))
    form: str = knob("sums", "running sums, or averages: the same, and exact for streams beyond 2^24 positions; causal",
                     other=("averages",))  # fmt: skip
    chunk: int = knob(64, "positions in a chunk; changes only time and memory", other=(4,))
    impl: str = knob("auto", f"implementation of the op: {', '.join(op.FLOW_ATTENTION.names())}", other=("definition",))

    def __post_init__(self) -> None:
        need, choice = config_lib.require, config_lib.require_choice
        need(self.heads >= 1, "heads", self.heads, "1 or more")
        need(self.head_width is None or self.head_width >= 1, "head_width", self.head_width, "1 or more, or none")
        choice("feature", self.feature, list(FEATURES))
        need(self.clip is None or 0 <= self.clip <= 50, "clip", self.clip, "from 0 to 50, whose exp fits fp32, or none")
        need(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        choice("form", self.form, _FORMS)
        need(self.causal or self.form == "sums", "form", self.form, "sums where causal is false: nothing runs")
        need(self.chunk >= 1, "chunk", self.chunk, "1 or more")
        choice("impl", self.impl, op.FLOW_ATTENTION.names())

    def head_dim(self, width: int) -> int:
        """Head width d in a model of the given width; ConfigError if the heads do not divide it."""
        if self.head_width is not None:
            return self.head_width
        config_lib.require(
            width % self.heads == 0, "heads", self.heads, f"divisors of the width {width}, or head_width set"
        )
        return width // self.heads

    def rule(self) -> FlowRule:
        """What the op computes."""
        return FlowRule(self.competition, self.allocation, self.clip, self.epsilon, self.form == "averages")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowCache:
    """The streaming state: the flows' sums, and the id of the current document [B] int32, -1 at first."""

    flows: FlowState
    segment: jax.Array


@register("flow")
class Flow(HeadMixer):
    """`o = sigmoid(I^) (q / I) sum k (competition v)^T` with features q, k: linear attention normalised by the incoming
    flow I, its values reweighted by a softmax over sources of their outgoing flow, its outputs gated by the incoming
    flow (formulas: `attnlab.ops.flow_definition`). The causal form is that of the authors' code, an approximation of
    conservation that sees no later position. Metric `flow_clipped`: the share of sources whose flow the clip changes.
    """

    Config = FlowConfig
    capabilities = Capabilities(causal=True, bidirectional=True, streaming=True, fixed_state=True)
    context = "running sums are passed on, in three exchanges that depend on each other"
    paper = "Wu et al. 2022, Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022, arXiv:2202.06258"
    extension = (
        "the causal chunked and streaming form; form=averages; documents packed in a row; clip=none in the causal "
        "form; clip is 5, that of the authors' language models (their core code: 1, which clips about half of all "
        "sources, as the mean flow is 1)"
    )
    implementations = op.FLOW_ATTENTION.table
    counted = "chunked"
    variants = (
        {"form": "averages", "clip": None, "chunk": 4},
        {"causal": False, "clip": None, "allocation": False, "chunk": 4},
    )

    def __init__(self, config: FlowConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config, self.dtype = config, dtype
        self.head_dim = config.head_dim(width)
        inner = config.heads * self.head_dim
        self.q, self.k, self.v = (Linear(width, inner, ("embed", "heads"), rngs=rngs, dtype=dtype) for _ in range(3))
        self.out = Linear(inner, width, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def heads(self, x: jax.Array, seq: Sequence, state: FlowCache | None = None) -> MixerOutput:
        c, segments = self.config, seq.segments
        if state is not None and segments is None:
            segments = jnp.ones(x.shape[:2], jnp.int32)
        split = lambda y: y.reshape(*x.shape[:2], c.heads, self.head_dim)
        features = lambda y: FEATURES[c.feature](split(y).astype(param_dtype(self.dtype)))
        documents = None if segments is None else document_index(segments, None if state is None else state.segment)
        out = op.flow_attention(
            features(self.q(x)), features(self.k(x)), split(self.v(x)), c.rule(), causal=c.causal, documents=documents,
            state=None if state is None else state.flows, chunk=c.chunk, impl=c.impl,
        )  # fmt: skip
        o = out.o
        if segments is not None:
            o = jnp.where((segments == 0)[..., None, None], 0, o)  # padding mixes nothing
        metrics = {}
        if c.competition and c.clip is not None:
            metrics["flow_clipped"] = _share(out.outgoing > c.clip, segments, out.outgoing.dtype)
        return MixerOutput(o, None if state is None else FlowCache(out.state, segments[:, -1]), metrics=metrics)

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(o_BTHe.reshape(*x.shape[:2], -1))

    def init_state(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> FlowCache:
        c = self.config
        if not c.causal:
            raise UnsupportedPattern(f"mixer {self.name!r} with causal=False does not stream")
        wide = param_dtype(self.dtype)  # sums along the sequence are fp32, or wider, whatever the activations are
        flows = empty_state(c.rule(), batch, c.heads, self.head_dim, self.head_dim, wide)
        return FlowCache(flows, jnp.full((batch,), -1, jnp.int32))

    @classmethod
    def flops(cls, config: FlowConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        d = config.head_dim(width)
        flows = op.matrix_flops(config.rule(), config.causal, length, d, d, config.chunk)
        return {"projections": 8.0 * width * config.heads * d, "flows": config.heads * flows}, None


def _share(chosen_BTH: jax.Array, segments_BT: jax.Array | None, dtype: Any) -> jax.Array:
    """The share of positions and heads where `chosen`, padding left out."""
    if segments_BT is None:
        return jnp.mean(chosen_BTH, dtype=dtype)
    used = (segments_BT > 0)[..., None]
    return jnp.sum(chosen_BTH & used, dtype=dtype) / jnp.maximum(jnp.sum(used) * chosen_BTH.shape[2], 1)
