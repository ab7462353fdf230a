"""A model on held-out data: its sums over all batches, and the figures that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from attnlab.models.objective import Figures, Objective


def evaluate(
    objective: type[Objective],
    eval_step: Callable[[Any], dict[str, jax.Array]],
    batches: Iterable[Any],
    facts: Mapping[str, Any],
) -> Figures:
    """Adds up `eval_step(batch)`, sums over a batch by name, and summarises them.

    The next batch is dispatched before the sums of the last are fetched.

    Args:
      objective: says what the sums mean.
      facts: what the data knows of these batches, see `attnlab.data.base.Heldout.facts`.
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
    return objective.summarize(totals, facts)
