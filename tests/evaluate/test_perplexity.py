"""Figures of an evaluation from its sums."""

import math

import numpy as np

from attnlab.evaluate.heldout import evaluate
from attnlab.models.lm import LanguageModel


def test_figures_follow_from_sums():
    """Loss per token, perplexity, bits per byte, and loss by position, over batches of different sizes."""
    batches = [
        {"nll": np.array([4.0, 2.0, 1.0, 1.0]), "tokens": np.array([2.0, 2.0, 1.0, 1.0])},
        {"nll": np.array([2.0, 0.0, 0.0, 0.0]), "tokens": np.array([2.0, 0.0, 0.0, 0.0])},
    ]
    result = evaluate(LanguageModel, lambda b: b, batches, {"bytes": 10})
    assert result.tokens == 8
    assert math.isclose(result.loss, 10 / 8)
    assert math.isclose(result.perplexity, math.exp(10 / 8))
    assert math.isclose(result.bits_per_byte, 10 / math.log(2) / 10)
    rows = result.by_position()
    assert [(r["first"], r["last"], r["tokens"]) for r in rows] == [(0, 0, 4), (1, 1, 2), (2, 3, 2)]
    assert math.isclose(sum(r["loss"] * r["tokens"] for r in rows), 10)
