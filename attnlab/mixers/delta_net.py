"""DeltaNet: a linear memory per head that takes out what it holds at a key before it writes there, and never decays."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from attnlab.mixers.base import knob, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(GatedDeltaNetConfig):
    """Knobs of DeltaNet: those of Gated DeltaNet but for the decay, and what its keys may turn round."""

    decay: ClassVar[bool] = False

    query_scale: float | None = knob(None, "factor on queries of length 1; none: 1 / sqrt(d)", other=(1.0,), above=0)
    gate: bool = knob(False, "multiply the normed outputs by silu(x W_g)", other=(True,))
    negative_eigenvalues: bool = knob(
        False,
        "beta = 2 sigmoid(x W_b), so that a write may turn what the memory holds at a key into its opposite "
        "(Grazzi et al. 2024, arXiv:2411.12537)",
        other=(True,),
    )


@register("delta_net")
class DeltaNet(GatedDeltaNet):
    """`S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`, `o_t = S_t q_t / sqrt(d)` per head; `RMSNorm(o) W_o`.

    q, k and v are projections of x, convolved along the sequence, through SiLU; q and k are divided by their length.
    `beta_t = sigmoid(x W_b)`. The norm's scale is shared by all heads.
    """

    Config = DeltaNetConfig
    paper = (
        "Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length, "
        "arXiv:2406.06484; the rule: Schlag et al. 2021, arXiv:2102.11174"
    )
    variants = (
        {"heads": 2, "head_width": 4, "expand": 1.5, "conv": 2, "chunk": 3, "negative_eigenvalues": True},
        {"key_heads": 2, "gate": True, "chunk": 4},
    )

    def strength(self, logits_BTH: jax.Array) -> jax.Array:
        beta = super().strength(logits_BTH)
        return 2 * beta if self.config.negative_eigenvalues else beta
