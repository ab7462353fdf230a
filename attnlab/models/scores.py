"""Figures of answers that are right or wrong: accuracy, whole rows, slices, beside guessing and an oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sums_of_scores(
    nll_BT: jax.Array, weights_BT: jax.Array, right_BT: jax.Array, slices_BTN: jax.Array | None
) -> dict[str, jax.Array]:
    """Sums over a batch, which add up: `rows` that count, those `exact`, and losses, hits and weights by slice.

    Args:
      nll_BT: losses, by their weights.
      weights_BT: how much each position counts.
      right_BT: bool, whether the likeliest answer is the right one.
      slices_BTN: which of N slices each position belongs to; None: there are none.
    """
    dtype, counts = nll_BT.dtype, jnp.any(weights_BT > 0, axis=1)
    exact = counts & jnp.all(right_BT | (weights_BT == 0), axis=1)
    sums = {"rows": jnp.sum(counts, dtype=dtype), "exact": jnp.sum(exact, dtype=dtype)}
    if slices_BTN is not None:
        parts = {"slice_nll": nll_BT, "slice_correct": right_BT * weights_BT, "slice_tokens": weights_BT}
        member = slices_BTN.astype(dtype)
        highest = jax.lax.Precision.HIGHEST
        sums |= {k: jnp.einsum("bt,btn->n", v.astype(dtype), member, precision=highest) for k, v in parts.items()}
    return sums


@dataclasses.dataclass(frozen=True)
class Scores:
    """Answers on held-out rows.

    Attributes:
      sums: float64: `nll`, `tokens` (the weights) and `correct` [T] by position, what `sums_of_scores` gives.
      facts: what the data knows: `chance` and, where there is a rule to know, `oracle` (what guessing and what knows it
        score, by metric), and `slices`, the labels of the slices.
    """

    sums: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the right answers, nats."""
        return self._mean("nll")

    @property
    def accuracy(self) -> float:
        """Share of answers that are right."""
        return self._mean("correct")

    @property
    def exact(self) -> float:
        """Share of rows with all answers right."""
        return float(self.sums["exact"] / max(self.sums["rows"], 1))

    @property
    def answers(self) -> int:
        """Answers scored."""
        return round(float(self.sums["tokens"].sum()))

    def _mean(self, name: str) -> float:
        return float(self.sums[name].sum() / max(self.sums["tokens"].sum(), 1))

    def slices(self) -> list[dict[str, Any]]:
        """`{slice, answers, accuracy, loss}` of every slice that is not empty."""
        rows = []
        for i, label in enumerate(self.facts["slices"]):
            if count := float(self.sums["slice_tokens"][i]):
                mean = lambda name: float(self.sums[name][i] / count)
                row = {"slice": label, "answers": round(count), "accuracy": mean("slice_correct")}
                rows.append(row | {"loss": mean("slice_nll")})
        return rows

    def named(self) -> dict[str, float]:
        """Every figure by its name: `accuracy`, `exact`, `loss`, `accuracy/SLICE`."""
        slices = {f"accuracy/{row['slice']}": row["accuracy"] for row in self.slices()}
        return {"loss": self.loss, "accuracy": self.accuracy, "exact": self.exact} | slices

    def record(self) -> dict[str, float]:
        return {f"heldout_{name}": value for name, value in self.named().items()}

    def summary(self) -> dict[str, Any]:
        rows = round(float(self.sums["rows"]))
        known = {who: dict(self.facts[who]) for who in ("chance", "oracle") if who in self.facts}
        return {**self.named(), **known, "answers": self.answers, "rows": rows, "by_slice": self.slices()}

    def line(self) -> str:
        chance = f" (chance {self.facts['chance']['accuracy']:.4f})"
        return (
            f"held-out accuracy {self.accuracy:.4f}{chance}, exact {self.exact:.4f}, loss {self.loss:.4f} "
            f"on {self.answers:,} answers"
        )

    def lines(self) -> list[str]:
        oracle = ""
        if "oracle" in self.facts:
            oracle = f"; an oracle has accuracy {self.facts['oracle']['accuracy']:.4f}"
        return [self.line().removeprefix("held-out ") + oracle]

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        rows = [
            [r["slice"], f"{r['answers']:,}", f"{r['accuracy']:.4f}", f"{r['loss']:.4f}"]
            for r in [{**self.named(), "slice": "all", "answers": self.answers}, *self.slices()]
        ]
        return "accuracy by slice", ["slice", "answers", "accuracy", "loss"], rows
