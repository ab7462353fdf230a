"""Held-out loss: perplexity, bits per byte, and the loss by position in the context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
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

    def summary(self) -> dict[str, Any]:
        """The figures as one JSON object."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "by_position": self.by_position(),
        }


def evaluate(eval_step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any], text_bytes: int) -> Evaluation:
    """Runs `eval_step(batch)`, which gives sums `nll` [T] and `tokens` [T], over all batches.

    The next batch is dispatched before the sums of the last are fetched.

    Args:
      text_bytes: UTF-8 bytes of the text of all batches, see `HeldoutLoader.bytes`.
    """
    totals: dict[str, np.ndarray] = {}
    pending = None

    def add(sums: dict[str, jax.Array] | None) -> None:
        for name, value in (sums or {}).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)

    for batch in batches:
        pending, done = eval_step(batch), pending
        add(done)
    add(pending)
    return Evaluation(totals["nll"], totals["tokens"], text_bytes)
