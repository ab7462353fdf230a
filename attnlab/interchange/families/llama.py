"""Llama 2 and 3 (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783)."""

from __future__ import annotations

from typing import Any

from attnlab.interchange.families.base import Family
from attnlab.interchange.fields import Fields


class Llama(Family):
    name = model_type = "llama"
    architecture = "LlamaForCausalLM"
    heads_divide = True

    def more(self, fields: Fields) -> dict[str, Any]:
        fields.must("rope_interleaved", False)
        return {"mlp_bias": fields.flag("mlp_bias")}

    def bias(self, fields: Fields) -> str:
        return "all" if fields.flag("attention_bias") else "none"

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        return {"attention_bias": layers[0].bias == "all", "mlp_bias": config.mlp_bias}
