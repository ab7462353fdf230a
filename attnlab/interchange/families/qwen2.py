"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): biases of queries, keys and values; late layers windowed."""

from __future__ import annotations

from typing import Any

from attnlab.interchange.families.base import Family, windowed
from attnlab.interchange.fields import Fields


class Qwen2(Family):
    name = model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        fields.must("use_mrope", False)
        return windowed(fields, layers)

    def bias(self, fields: Fields) -> str:
        return "qkv"

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        return windows(self.write_layer_types(layers))


def windows(kinds: dict[str, Any]) -> dict[str, Any]:
    """The keys of windows, from `layer_types`."""
    used = kinds["sliding_window"] is not None
    first = kinds["layer_types"].index("sliding_attention") if used else len(kinds["layer_types"])
    return kinds | {"use_sliding_window": used, "max_window_layers": first}
