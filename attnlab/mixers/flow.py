"""Flow attention: linear attention whose sources compete and whose sinks are allocated by conserved flows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.mixers.heads import HeadConfig, HeadMixer, Projections, split_heads
from attnlab.mixers.parts import param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops import flow_attention as op
from attnlab.ops.flow_definition import FlowRule, FlowState, empty_state

FEATURES = {
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda x: jax.nn.relu(x) + 1e-6,  # as in the authors' code for the Long Range Arena
    "elu": lambda x: jax.nn.elu(x) + 1,  # of linear attention (Katharopoulos et al. 2020)
}


@dataclasses.dataclass(frozen=True)
class FlowConfig(HeadConfig):
    """Knobs of flow attention."""

    causal: bool = knob(True, "whether a position sees only itself and those before", other=(False,))
    feature: str = knob(
        "sigmoid", f"feature map of queries and keys: {', '.join(FEATURES)}", other=("relu", "elu"), choices=FEATURES
    )
    competition: bool = knob(True, "whether sources compete: a softmax over them scales values", other=(False,))
    allocation: bool = knob(True, "whether outputs are scaled by the sigmoid of the incoming flow", other=(False,))
    clip: float | None = knob(
        5.0, "competition clips outgoing flows (their mean is 1) to [-clip, clip]; none: not", other=(None,)
    )
    epsilon: float = knob(1e-6, "added to features and to their sums", other=(1e-2,), above=0)
    form: str = knob(
        "sums",
        "running sums, or averages: the same, and exact for streams beyond 2^24 positions; causal",
        other=("averages",),
        choices=("sums", "averages"),
    )
    chunk: int = knob(64, "positions in a chunk; changes only time and memory", other=(4,), least=1)
    impl: str = impl_knob(op.FLOW_ATTENTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.clip is None or 0 <= self.clip <= 50, "clip", self.clip, "from 0 to 50, whose exp fits fp32, or none")
        need(self.causal or self.form == "sums", "form", self.form, "sums where causal is false: nothing runs")

    def rule(self) -> FlowRule:
        """What the op computes."""
        return FlowRule(self.competition, self.allocation, self.clip, self.epsilon, self.form == "averages")


@register("flow")
class Flow(HeadMixer):
    """`o = sigmoid(I^) (q / I) sum k (competition v)^T` with features q, k: linear attention normalised by the incoming
    flow I, its values reweighted by a softmax over sources of their outgoing flow, its outputs gated by the incoming
    flow (formulas: `attnlab.ops.flow_definition`). The causal form is that of the authors' code, an approximation of
    conservation that sees no later position. Metric `flow_clipped`: the share of sources whose flow the clip changes.
    """

    Config = FlowConfig
    capabilities = Capabilities(causal=True, bidirectional=True, streaming=True, fixed_state=True)
    sequence_parallel = "running sums are passed on, in three exchanges that depend on each other"
    paper = "Wu et al. 2022, Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022, arXiv:2202.06258"
    extension = (
        "the causal chunked and streaming form; form=averages; documents packed in a row; feature=elu; clip=none in "
        "the causal form; clip is 5, that of the authors' language models (their core code: 1, which clips about half "
        "of all sources, as the mean flow is 1)"
    )
    implementations = op.FLOW_ATTENTION.table
    counted = "chunked"
    variants = (
        {"form": "averages", "clip": None, "chunk": 4},
        {"causal": False, "clip": None, "allocation": False, "chunk": 4},
    )

    def __init__(self, config: FlowConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        make, inner = Projections(config, width, rngs=rngs, dtype=dtype), config.heads * self.head_dim
        self.q, self.k, self.v = (make.qkv(inner) for _ in range(3))
        self.out = make.out(inner)

    def heads(self, x: jax.Array, seq: Sequence, carried: FlowState | None = None) -> MixerOutput:
        c = self.config
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        features = lambda y: FEATURES[c.feature](y.astype(param_dtype(self.dtype)))
        out = op.flow_attention(
            features(q),
            features(k),
            v,
            c.rule(),
            causal=c.causal,
            documents=seq.documents,
            state=carried,
            chunk=c.chunk,
            impl=c.impl,
        )
        metrics = {}
        if c.competition and c.clip is not None:
            metrics["flow_clipped"] = _share(out.outgoing > c.clip, seq.segments, out.outgoing.dtype)
        return MixerOutput(out.o, None if carried is None else out.state, metrics=metrics)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> FlowState:
        wide = param_dtype(self.dtype)  # sums along the sequence are fp32, or wider, whatever the activations are
        return empty_state(self.config.rule(), batch, self.config.heads, self.head_dim, self.head_dim, wide)

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
