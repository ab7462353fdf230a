"""Figures of a language model on held-out text: perplexity, bits per byte, and the loss by position in the context."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sums over held-out tokens.

    Attributes:
      nll_T: float64 [T], nats, by position in the document's part of a row.
      tokens_T: float64 [T], tokens by position.
      bytes: UTF-8 bytes of the text that the tokens stand for.
    """

    nll_T: np.ndarray
    tokens_T: np.ndarray
    bytes: int

    @property
    def tokens(self) -> int:
        """Tokens evaluated."""
        return int(self.tokens_T.sum())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, nats."""
        return float(self.nll_T.sum() / max(self.tokens_T.sum(), 1))

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; comparable between tokenizers."""
        return float(self.nll_T.sum() / math.log(2) / max(self.bytes, 1))

    def by_position(self, buckets: int = 8) -> list[dict[str, float]]:
        """Mean loss over buckets of positions whose bounds double: `{first, last, tokens, loss}`, no empty ones."""
        length = len(self.nll_T)
        edges = sorted({0, length, *(max(length >> i, 1) for i in range(1, buckets))})
        rows = []
        for lo, hi in zip(edges, edges[1:]):
            tokens = self.tokens_T[lo:hi].sum()
            if tokens:
                loss = float(self.nll_T[lo:hi].sum() / tokens)
                rows.append({"first": lo, "last": hi - 1, "tokens": int(tokens), "loss": loss})
        return rows

    def record(self) -> dict[str, float]:
        return {"heldout_loss": self.loss, "heldout_bits_per_byte": self.bits_per_byte}

    def summary(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "by_position": self.by_position(),
        }

    def line(self) -> str:
        return f"held-out loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte on {self.tokens:,} tokens"

    def lines(self) -> list[str]:
        return [
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte; "
            f"{self.tokens:,} held-out tokens"
        ]

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        rows = [[f"{r['first']} to {r['last']}", f"{r['tokens']:,}", f"{r['loss']:.4f}"] for r in self.by_position()]
        return "loss by position in the context", ["positions", "tokens", "loss"], rows
