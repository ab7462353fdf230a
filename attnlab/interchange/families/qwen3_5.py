"""Qwen3.5's dense text model: Qwen3-Next whose projections lie in tensors side by side, not key head by key head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attnlab.interchange.families.base import linear
from attnlab.interchange.families.qwen3_next import Hybrid
from attnlab.interchange.pieces import Piece


class Qwen35(Hybrid):
    name = model_type = "qwen3_5_text"
    architecture = "Qwen3_5ForCausalLM"

    def projections(
        self, width: int, K: int, H: int, d: int, e: int, leaf: str, repeat: int, there: str
    ) -> Iterator[Piece]:
        parts = np.split(np.arange(2 * K * d + H * e), [K * d, 2 * K * d])
        total = sum(map(len, parts))
        for name, rows in zip(("q", "k", "v"), parts):
            yield from linear(f"{leaf}.{name}", repeat, f"{there}in_proj_qkv", width, len(rows), rows=rows, shape=total)
        for name, tensor, columns in (("gate", "z", H * e), ("beta", "b", H), ("log_decay.linear", "a", H)):
            yield from linear(f"{leaf}.{name}", repeat, f"{there}in_proj_{tensor}", width, columns)
