"""Qwen3 with gated attention as its authors released it (Qiu et al. 2025, Gated Attention for Large Language Models):
queries and gate lie in one tensor, group by group of the heads that share keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from attnlab.interchange.families.base import Family, linear
from attnlab.interchange.families.qwen3 import GATES, Qwen3
from attnlab.interchange.fields import Fields
from attnlab.interchange.pieces import Piece


class GatedQwen3(Qwen3):
    name = "gated_qwen3"
    own_code = "qiuzh20/gated_attention"
    mixer = "gated"

    def claims(self, tree: Mapping[str, Any]) -> bool:
        return Family.claims(self, tree) and any(gate in tree for gate in GATES)

    def node(self, fields: Fields, kind: str) -> dict[str, Any]:
        elementwise, headwise = (fields.flag(gate) for gate in GATES)
        if not (elementwise or headwise):
            fields.refuse(GATES[0], "true, or headwise_attn_output_gate true")
        normed = fields.flag("use_qk_norm", True)
        node = super().node(fields, kind) | {"granularity": "headwise" if headwise else "elementwise"}
        return node if normed else node | {"qk_norm": False, "qk_epsilon": None}

    def bias(self, fields: Fields) -> str:
        for key in ("qkv_bias", "attention_bias"):  # the gate would have one, too, which attnlab's has not
            fields.must(key, False)
        return "none"

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        gates = [layers[0].granularity == kind for kind in ("elementwise", "headwise")]
        return (
            super().write_more(config, layers)
            | dict(zip(GATES, gates))
            | {"use_qk_norm": layers[0].qk_norm is not False, "qkv_bias": False}
        )

    def mixer_pieces(self, mixer: Any, width: int, leaf: str, repeat: int, there: str) -> Iterator[Piece]:
        queries, gates = group_rows(mixer, mixer.head_dim(width))
        yield from fused_queries(mixer, width, leaf, repeat, there, queries, gates)
        for piece in super().mixer_pieces(mixer, width, leaf, repeat, there):
            if not piece.tensor.endswith("q_proj.weight"):
                yield piece


def group_rows(mixer: Any, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `q_proj`: of each group of heads, its queries and then its gates."""
    group = mixer.heads // mixer.key_heads
    wide = d if mixer.granularity == "elementwise" else 1
    rows = np.arange(mixer.heads * (d + wide)).reshape(mixer.key_heads, group * (d + wide))
    return rows[:, : group * d].reshape(-1), rows[:, group * d :].reshape(-1)


def fused_queries(mixer: Any, width: int, leaf: str, repeat: int, there: str, queries: np.ndarray,
                  gates: np.ndarray) -> Iterator[Piece]:  # fmt: skip
    """Of queries and gate in one tensor, by their rows."""
    rows = len(queries) + len(gates)
    for name, own in (("q", queries), ("gate.linear", gates)):
        yield from linear(f"{leaf}.{name}", repeat, f"{there}self_attn.q_proj", width, len(own), rows=own, shape=rows)
