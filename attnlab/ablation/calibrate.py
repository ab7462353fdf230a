"""How long a step of each arm takes here: every arm's program runs its steps in turns with the others'."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence

import jax

from attnlab.ablation.plan import Cell
from attnlab.errors import UserError
from attnlab.memory import size
from attnlab.train import hardware
from attnlab.train.program import Program, open_data

STEPS = 20


def step_seconds(cells: Sequence[Cell], steps: int = STEPS) -> dict[str, float]:
    """Median seconds of a training step by cell, its batch fetched and placed included.

    The first step of each, which compiles, is not counted. Cells take turns, step by step, so that all see the same
    machine.

    Raises:
      UserError: an arm does not fit this machine.
    """
    Program.share(len(cells))
    with contextlib.ExitStack() as stack:
        timed = [stack.enter_context(contextlib.closing(_Timed(cell))) for cell in cells]
        for _ in range(steps):
            for one in timed:
                one.step()
    return {one.cell.name: statistics.median(one.seconds) for one in timed}


class _Timed:
    """A cell's program, its state and its data."""

    def __init__(self, cell: Cell):
        self.cell, self.seconds = cell, []
        config = cell.config()
        try:
            data, self._program = open_data(config), Program.of(config)
            hardware.require_memory(config, size(self._program.batch), size(self._program.state))
        except UserError as error:
            raise UserError(f"arm {cell.name!r} cannot be timed here: {error}") from None
        self._loader = data.training(seed=config.seed, rows=self._program.rows(config.data.batch))
        self._state = self._program.first_state(config.seed)
        try:
            self.step()
        except BaseException:
            self.close()
            raise
        self.seconds.clear()

    def step(self) -> None:
        """Runs and times a step."""
        began = time.perf_counter()
        batch = self._program.put(next(self._loader))
        self._state, metrics = self._program.train_step(self._state, batch)
        jax.block_until_ready((self._state, metrics))
        self.seconds.append(time.perf_counter() - began)

    def close(self) -> None:
        """Stops reading ahead."""
        self._loader.close()
