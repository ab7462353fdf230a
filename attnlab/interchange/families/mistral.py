"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): Llama with a window on all layers, or none."""

from __future__ import annotations

from typing import Any

from attnlab.interchange.families.base import FULL, SLIDING, Family
from attnlab.interchange.fields import Fields, layer_kinds


class Mistral(Family):
    name = model_type = "mistral"
    architecture = "MistralForCausalLM"

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        # A file without the key has the default of the family's code; null is none.
        window = fields.integer("sliding_window", None)
        if window is None and not fields.has("sliding_window"):
            fields.refuse("sliding_window", "a number of positions, or null")
        kind = FULL if window is None else SLIDING
        return layer_kinds(fields, layers, [kind] * layers)

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        return {"sliding_window": layers[0].window}
