"""Gated softmax attention: `Y' = Y * act(x W)` at one of five places of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers.attention import Reads
from attnlab.mixers.base import MixerOutput, knob, register
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, param
from attnlab.mixers.softmax import Softmax, SoftmaxConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "ns_sigmoid": lambda z: 0.5 + 0.5 * jax.nn.sigmoid(z),  # cannot close: keeps the non-linearity, forbids zeros
    "identity": lambda z: z,
}
POSITIONS = {
    "G1": "the heads' outputs, before the output projection",
    "G2": "values",
    "G3": "keys, before QK-norm and RoPE",
    "G4": "queries, before QK-norm and RoPE",
    "G5": "the layer's output, after the output projection",
}


@dataclasses.dataclass(frozen=True)
class GatedConfig(SoftmaxConfig):
    """Knobs of gated attention: those of softmax attention, and the gate's."""

    position: str = knob(
        "G1",
        f"what is gated: {'; '.join(f'{k} {v}' for k, v in POSITIONS.items())}",
        other=("G2", "G3", "G4", "G5"),
        choices=POSITIONS,
    )
    granularity: str = knob(
        "elementwise",
        "elementwise: a score per channel; headwise: one per head",
        other=("headwise",),
        choices=("elementwise", "headwise"),
    )
    sharing: str = knob(
        "specific",
        "specific: scores of each head; shared: their mean over heads",
        other=("shared",),
        choices=("specific", "shared"),
    )
    operation: str = knob(
        "multiplicative",
        "multiplicative: Y * score; additive: Y + score",
        other=("additive",),
        choices=("multiplicative", "additive"),
    )
    activation: str = knob(
        "sigmoid", f"{', '.join(ACTIVATIONS)}", other=("silu", "ns_sigmoid", "identity"), choices=ACTIVATIONS
    )
    input_dependent: bool = knob(
        True, "true: score act(x W); false: act(theta), theta learned, zero at first", other=(False,)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        if self.position == "G5":
            need(
                self.granularity == "elementwise", "granularity", self.granularity, "elementwise at G5: it has no heads"
            )
            need(self.sharing == "specific", "sharing", self.sharing, "specific at G5: it has no heads")
        groups = self.key_heads if self.position in ("G2", "G3") else self.heads
        need(groups > 1 or self.sharing == "specific", "sharing", self.sharing, "specific where one head is gated")
        if self.position in ("G3", "G4") and self.qk_norm and self.operation == "multiplicative":
            need(
                self.granularity == "elementwise",
                "granularity",
                self.granularity,
                f"elementwise at {self.position} with qk_norm, which cancels a scale per head",
            )

    @property
    def is_output_gate(self) -> bool:
        """Whether it is a logistic function of x at each channel of the heads' outputs, which attention applies."""
        how = self.position, self.granularity, self.sharing, self.operation, self.activation
        default = "G1", "elementwise", "specific", "multiplicative", "sigmoid"
        return self.input_dependent and how == default


class Gate(nnx.Module):
    """Scores for `groups` heads of width `width_per_group`: [..., groups, width_per_group or 1], in fp32."""

    def __init__(
        self, config: GatedConfig, width: int, groups: int, head_dim: int, axis: str, *, rngs: nnx.Rngs, dtype: Any
    ):
        self.config, self.groups = config, groups
        self.columns = head_dim if config.granularity == "elementwise" else 1
        if config.input_dependent:
            self.linear = Linear(width, groups * self.columns, ("embed", axis), rngs=rngs, dtype=dtype)
        else:
            logits = jnp.zeros((groups * self.columns,), param_dtype(dtype))
            self.theta = param(logits, axes=(axis,), role=Role.BIAS)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., groups, width_per_group or 1], without leading axes where they do not depend on x."""
        logits = self.linear(x) if self.config.input_dependent else self.theta[...]
        return logits.reshape(*logits.shape[:-1], self.groups, self.columns)

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = self.logits(x)
        scores = ACTIVATIONS[self.config.activation](logits.astype(param_dtype(logits.dtype)))
        if self.config.sharing == "shared":
            scores = jnp.mean(scores, axis=-2, keepdims=True)
        return scores

    def apply(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """y [..., groups, head_dim], gated by x [..., D]."""
        scores = self(x)
        wide = y.astype(scores.dtype)
        return (wide * scores if self.config.operation == "multiplicative" else wide + scores).astype(y.dtype)


@register("gated")
class Gated(Softmax):
    """Softmax attention with a learned gate; the default (G1, elementwise, sigmoid) is the paper's recommendation.

    Head-shared scores are the mean over heads of the activated scores, so that the parameters stay as many.
    Positions, granularities, sharing and operations are those of sections 2.2 and 3 of the paper.
    """

    Config = GatedConfig
    paper = "Qiu et al. 2025, Gated Attention for Large Language Models, NeurIPS 2025"
    variants = (
        {"kv_heads": 2, "window": 4, "sinks": True, "position": "G2", "granularity": "headwise", "sharing": "shared"},
        {
            "kv_heads": 1,
            "position": "G4",
            "operation": "additive",
            "activation": "silu",
            "qk_norm": True,
            "bias": "qkv",
        },
    )

    def __init__(self, config: GatedConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        super().__init__(config, width=width, rngs=rngs, dtype=dtype)
        groups, head_dim, axis = _gate_shape(config, width)
        gated_by = config.read_width(width) if config.position in ("G2", "G3") else width
        self.gate = Gate(config, gated_by, groups, head_dim, axis, rngs=rngs, dtype=dtype)

    def queries(self, x: jax.Array) -> jax.Array:
        q = super().queries(x)
        return self.gate.apply(q, x) if self.config.position == "G4" else q

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = super().keys_values(x)
        if self.config.position == "G2":
            v = self.gate.apply(v, x)
        elif self.config.position == "G3":
            k = self.gate.apply(k, x)
        return k, v

    def output_gate(self, x: jax.Array) -> jax.Array | None:
        return self.gate.logits(x) if self.config.is_output_gate else None

    def attended(self, reads: Reads, x: jax.Array) -> MixerOutput:
        out, c = super().attended(reads, x), self.config
        if c.position != "G1" or c.is_output_gate:
            return out
        return dataclasses.replace(out, y=self.gate.apply(out.y, x))

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        y = super().combine(o_BTHe, x)
        return self.gate.apply(y[..., None, :], x)[..., 0, :] if self.config.position == "G5" else y

    @classmethod
    def flops(cls, config: GatedConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        flops, span = super().flops(config, width, length)
        if config.input_dependent:
            if config.source is None or config.position not in ("G2", "G3"):
                flops["gate"] = cls._gate_flops(config, width, width)
        return flops, span

    @classmethod
    def context_flops(cls, config: GatedConfig, width: int) -> float:
        flops = super().context_flops(config, width)
        if config.source is not None and config.input_dependent and config.position in ("G2", "G3"):
            flops += cls._gate_flops(config, width, config.read_width(width))
        return flops

    @staticmethod
    def _gate_flops(config: GatedConfig, width: int, fan_in: int) -> float:
        groups, head_dim, _ = _gate_shape(config, width)
        return 2.0 * fan_in * groups * (head_dim if config.granularity == "elementwise" else 1)


def _gate_shape(config: GatedConfig, width: int) -> tuple[int, int, str]:
    """Groups, their width and their logical axis at the gated position."""
    d = config.head_dim(width)
    if config.position == "G5":
        return 1, width, "embed_out"
    if config.position in ("G2", "G3"):
        return config.key_heads, d, "kv_heads"
    return config.heads, d, "heads"
