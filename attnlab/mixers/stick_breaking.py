"""Stick-breaking attention: each key, the nearest first, takes a share of what those nearer have left."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from attnlab.mixers.attention import Attention, AttentionConfig
from attnlab.mixers.base import Capabilities, MixerOutput, impl_knob, knob, register
from attnlab.ops.keys_values import KeysValues
from attnlab.ops.masks import Mask
from attnlab.ops.stick_breaking import STICK_BREAKING, stick_breaking


@dataclasses.dataclass(frozen=True)
class StickBreakingConfig(AttentionConfig):
    """Knobs of stick-breaking attention: it looks back only, and has no positions and no norm of queries and keys."""

    causal: ClassVar[bool] = True
    window: ClassVar[int | None] = None
    qk_norm: ClassVar[bool] = False
    qk_epsilon: ClassVar[float | None] = None
    rope_base: ClassVar[float | None] = None
    rope_width: ClassVar[int | None] = None
    rope_scaling: ClassVar[Any] = None

    attend_current: bool = knob(False, "whether a position's own key is the first to take a share", other=(True,))
    impl: str = impl_knob(STICK_BREAKING)


@register("stick_breaking")
class StickBreaking(Attention):
    """`o_i = sum_{j < i} p_ij v_j + r_i v_i` with `p_ij = s_ij prod_{j < l < i} (1 - s_il)` per head.

    s_ij is sigmoid(q_i . k_j / sqrt(d)); r_i is what is left, `prod_{l < i} (1 - s_il)`. `attnlab.ops.stick_breaking`
    has its forms.
    """

    Config = StickBreakingConfig
    capabilities = Capabilities()
    paper = (
        "Tan et al. 2024, Scaling Stick-Breaking Attention: An Efficient Implementation and In-depth Study, "
        "arXiv:2410.17980"
    )
    implementations = STICK_BREAKING.table
    variants = ({"kv_heads": 2, "attend_current": True, "bias": "all"}, {"kv_heads": 1, "head_width": 6})

    def attend(self, q: jax.Array, kv: KeysValues, mask: Mask, x: jax.Array) -> MixerOutput:
        options = {"current": self.config.attend_current, "impl": self.config.impl}
        return MixerOutput(stick_breaking(q, *kv.by_position(len(q)), mask, **options))
