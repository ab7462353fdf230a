"""A chunk of the delta rule inside a kernel."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas.linear_recurrence.chunk import Step
from kernels_pallas.linear_recurrence.plan import Plan


class DeltaStep(Step):
    """A step of the grid."""

    def __init__(self, plan: Plan, r: dict[str, Any], *, heads: int, backward: bool):
        super().__init__(plan, r, heads=heads, backward=backward)
        self._columns: dict[tuple[int, int], list[jax.Array]] = {}

    def columns(self, m: int, h: int, width: int) -> jax.Array:
        return self._spread(m, h)[0][:, :width]

    def beta(self, m: int, h: int) -> jax.Array:
        """[C, e], strengths of writing."""
        return self._spread(m, h)[-1][:, : self.plan.shape[4]]

    def _spread(self, m: int, h: int) -> list[jax.Array]:
        """Rows of a chunk as columns, all at once: sums of log decays, where they are rows, and strengths."""
        if (m, h) not in self._columns:
            names = ["beta"] if self.plan.channels else ["logs", "beta"]
            width = max(self.plan.sizes.chunk, *self.plan.shape[3:])
            self._columns[m, h] = self.spread_all([self.r[name][0, h, m] for name in names], width)
        return self._columns[m, h]
