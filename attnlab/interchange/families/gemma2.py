"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): four norms a layer, capped logits, every second layer windowed."""

from __future__ import annotations

import math
from typing import Any

from attnlab.interchange.families.base import FULL, SLIDING, Family
from attnlab.interchange.fields import Fields, layer_kinds


class Gemma2(Family):
    name = model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    tied = norm_after = heads_divide = True
    head_dim = 256
    norm_shift = 1.0
    activation = "gelu_pytorch_tanh"
    activation_key = "hidden_activation"
    caps = (50.0, 30.0)  # of attention's logits and of the output's, where the file does not say

    def more(self, fields: Fields) -> dict[str, Any]:
        fields.must("hidden_act", fields.get("hidden_activation", self.activation))
        fields.must("use_bidirectional_attention", False)
        return {
            "embedding_scale": math.sqrt(fields.integer("hidden_size")),
            "logit_cap": self.cap(fields, "final_logit_softcapping", self.caps[1]),
        }

    def cap(self, fields: Fields, key: str, default: float | None) -> float | None:
        """A cap; null is none, another thing than no such key."""
        return fields.number(key, None if fields.has(key) else default)

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        return layer_kinds(fields, layers, [FULL if i % 2 else SLIDING for i in range(layers)], [FULL, SLIDING])

    def window(self, fields: Fields) -> int:
        window = fields.integer("sliding_window", 4096)
        fields.must("sliding_window_size", window)
        return window

    def bias(self, fields: Fields) -> str:
        return "all" if fields.flag("attention_bias") else "none"

    def node(self, fields: Fields, kind: str) -> dict[str, Any]:
        fields.get("sliding_window", None)  # also where no layer is windowed
        cap = self.cap(fields, "attn_logit_softcapping", self.caps[0])
        return super().node(fields, kind) | {
            "query_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5, "soft_cap": cap
        }  # fmt: skip

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        first, d = layers[0], layers[0].head_dim(config.width)
        scale = d if first.query_scale is None else first.query_scale**-2
        whole = round(scale)
        return self.write_layer_types(layers) | {
            "attention_bias": first.bias == "all",
            "query_pre_attn_scalar": whole if abs(scale - whole) < 1e-6 * scale else scale,
            "attn_logit_softcapping": first.soft_cap,
            "final_logit_softcapping": config.logit_cap,
        }
