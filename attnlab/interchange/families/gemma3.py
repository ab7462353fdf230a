"""Gemma 3's text model (Gemma Team 2025, arXiv:2503.19786): one layer in six sees all, by a rotary base of its own."""

from __future__ import annotations

from typing import Any

from attnlab.interchange.families.base import FULL, SLIDING
from attnlab.interchange.families.gemma2 import Gemma2
from attnlab.interchange.fields import Fields, layer_kinds, rotary, rotary_keys


class Gemma3(Gemma2):
    name = model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    qk_norm = True
    caps = (None, None)
    # Files of models that see images, too, leave these out where they are so.
    defaults = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        every = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
        return layer_kinds(
            fields, layers, [SLIDING if (i + 1) % every else FULL for i in range(layers)], [FULL, SLIDING]
        )

    def rotary(self, fields: Fields, kind: str, head: int) -> dict[str, Any]:
        local = fields.number("rope_local_base_freq", 10_000.0)
        if kind == SLIDING:
            return rotary(fields, head, layer=SLIDING, base=local, local=True)
        return rotary(fields, head, layer=FULL, base=1_000_000.0)

    def write_rotary(self, config: Any, layers: list[Any], head: int) -> dict[str, Any]:
        by_kind = {SLIDING if layer.window is not None else FULL: layer for layer in layers}
        rules = {kind: rotary_keys(by_kind.get(kind, layers[0]), head) for kind in (SLIDING, FULL)}
        return {"rope_parameters": rules}
