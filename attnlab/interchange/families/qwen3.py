"""Qwen3, dense (Yang et al. 2025, arXiv:2505.09388): heads of a width of their own, queries and keys normed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnlab.interchange.families.base import Family, windowed
from attnlab.interchange.families.qwen2 import windows
from attnlab.interchange.fields import Fields

GATES = ("elementwise_attn_output_gate", "headwise_attn_output_gate")


class Qwen3(Family):
    name = model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    head_dim = 128
    qk_norm = True

    def claims(self, tree: Mapping[str, Any]) -> bool:
        return super().claims(tree) and not any(gate in tree for gate in GATES)

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        return windowed(fields, layers)

    def bias(self, fields: Fields) -> str:
        return "all" if fields.flag("attention_bias") else "none"

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        return {"attention_bias": layers[0].bias == "all"} | windows(self.write_layer_types(layers))
