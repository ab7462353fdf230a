"""What is held equal between arms: a knob of each arm is solved for, so that its cost is the baseline's.

Costs are those that `attnlab cost` tells: counted on the model that is built, never estimated from a size's name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from attnlab import config as config_lib
from attnlab.ablation.plan import Cell, Equal, PlanConfig
from attnlab.errors import ConfigError
from attnlab.models.cost import ModelCost, model_cost
from attnlab.train.config import RunConfig

_MOST = 2**22  # values of a knob that are tried at most
_WORDS = {
    "steps": "steps",
    "tokens": "tokens",
    "parameters": "parameters (without the embedding)",
    "flops": "FLOPs of the training",
    "state_bytes": "bytes of state",
    "seconds": "seconds",
}


@dataclasses.dataclass(frozen=True)
class Solved:
    """A cell at the baseline's cost.

    Attributes:
      cell: with its knob set.
      values: what was set.
      residual: per cent by which it is above (+) or below (-) the baseline.
      notes: what whoever reads the comparison must know.
    """

    cell: Cell
    values: dict[str, int]
    residual: float
    notes: tuple[str, ...] = ()


def cost_of(cell: Cell, length: int | None = None) -> ModelCost:
    """Of a cell's model on rows of its data's length, or of another."""
    return _cost(json.dumps(cell.tree, sort_keys=True), length)


@functools.lru_cache(maxsize=256)
def _cost(tree: str, length: int | None) -> ModelCost:
    config = config_lib.build(RunConfig, json.loads(tree))
    rows = config.data.batch // config.train.accumulate
    return model_cost(config.model, config.data.length if length is None else length, rows)


def tokens_of(cell: Cell) -> int:
    """Positions that a run of the cell trains on, padding included."""
    config = cell.config()
    return config.train.steps * config.data.batch * config.data.length


def amount(cell: Cell, equal: Equal, step_seconds: float = 0.0) -> float:
    """How much of what is to be equal a cell costs."""
    match equal.what:
        case "steps":
            return cell.tree["train"]["steps"]
        case "tokens":
            return tokens_of(cell)
        case "parameters":
            cost = cost_of(cell)
            return cost.parameters - cost.embedding_parameters
        case "flops":
            return 3 * cost_of(cell).total_flops * tokens_of(cell)
        case "state_bytes":
            return cost_of(cell, equal.length).state_bytes
    return cell.tree["train"]["steps"] * step_seconds


def solve(plan: PlanConfig, cells: list[Cell], step_seconds: Mapping[str, float] | None = None) -> dict[str, Solved]:
    """Every cell at the cost of the baseline's cell on its task, by the cells' names.

    Args:
      plan: says what is equal.
      cells: of the plan.
      step_seconds: of a step of each cell, where seconds are to be equal.

    Raises:
      ConfigError: an arm cannot be brought within the tolerance; the message has the nearest.
    """
    solved: dict[str, Solved] = {}
    seconds = step_seconds or {}
    for cell in cells:
        first = next(c for c in cells if c.arm == plan.first and c.task == cell.task)
        what = plan.equal.on(cell.task)
        target = amount(first, what, seconds.get(first.name, 0.0))
        if not target:
            raise ConfigError(
                f"equal.what = {what.what!r}: the baseline {plan.first!r} has none; take another baseline"
            )
        solved[cell.name] = _equalised(plan, cell, first, target, seconds.get(cell.name, 0.0))
    return solved


def _equalised(plan: PlanConfig, cell: Cell, first: Cell, target: float, step_seconds: float) -> Solved:
    equal = plan.equal.on(cell.task)
    residual = lambda c: 100 * (amount(c, equal, step_seconds) / target - 1)
    if cell is first or residual(cell) == 0:
        return Solved(cell, {}, 0.0)
    if equal.what == "steps":
        raise ConfigError(
            f"arm {cell.arm!r} has train.steps = {cell.tree['train']['steps']:,}, the baseline {plan.first!r} "
            f"{target:,}; allowed: the same, or equal.what = tokens, flops or seconds"
        )
    knobs = [equal.knob_of(cell.arm)]
    if knobs == ["model.mlp_width"] and equal.knob is None and cell.arm not in equal.knobs:
        knobs.append("model.width")  # where the MLP has not enough to give
    tried = []
    for knob in knobs:
        found = nearest(cell, knob, 1 if knob == "train.steps" else equal.multiple, residual)
        if found is not None and abs(found[2]) <= equal.tolerance:
            at, value, off = found
            return Solved(at, {knob: value}, off, _notes(at, first, knob))
        tried.append(f"{knob}: no value can be" if found is None else f"{knob} = {found[1]} is {found[2]:+.2f} % off")
    raise ConfigError(
        f"arm {cell.name!r} cannot have the baseline's {target:,.0f} {_WORDS[equal.what]} within "
        f"{equal.tolerance:g} %; the nearest: {'; '.join(tried)}\n"
        f"allow more with equal.tolerance, or name another key in equal.knobs.{cell.arm}"
    )


def _notes(cell: Cell, first: Cell, knob: str) -> tuple[str, ...]:
    if knob != "model.mlp_width":
        return ()
    now, before = (c.config().model.hidden for c in (cell, first))
    if now >= before * 2 / 3:
        return ()
    return (f"{cell.name}: the MLP is {now} wide, the baseline's {before}: less than two thirds",)


def nearest(cell: Cell, knob: str, multiple: int, residual: Callable[[Cell], float]) -> tuple[Cell, int, float] | None:
    """The legal value of an integer knob whose residual is nearest to 0, by bisection; the residual is monotone in it.

    Returns:
      The cell with it, the value and its residual; None where no value is legal.
    """
    seen: dict[int, tuple[Cell, int, float] | None] = {}

    def at(n: int) -> tuple[Cell, int, float] | None:
        if n not in seen:
            try:
                changed = cell.with_values({knob: n * multiple})
                seen[n] = (changed, n * multiple, residual(changed))
            except ConfigError as error:
                if "unknown key" in str(error):
                    raise ConfigError(f"arm {cell.arm!r}: equal.knobs: {error}") from None
                seen[n] = None
        return seen[n]

    low = _legal(at, range(1, 4097))
    if low is None:
        return None
    off = lambda n: at(n)[2]
    high = low
    while high * 2 * multiple <= _MOST and off(high) * off(low) > 0 or high == low:
        further = _legal(at, range(2 * high, 4 * high))
        if further is None or abs(off(further)) > abs(off(high)) and off(further) * off(high) > 0:
            break  # it leads away
        low, high = high, further
    while high - low > 1 and off(low) * off(high) < 0:
        middle = _legal(at, _outward(_crossing(low, high, off(low), off(high)), low, high))
        if middle is None:
            break
        low, high = (middle, high) if off(middle) * off(low) > 0 else (low, middle)
    found = [seen[n] for n in sorted(seen) if seen[n] is not None]
    return min(found, key=lambda f: abs(f[2]))


def _crossing(low: int, high: int, at_low: float, at_high: float) -> int:
    """Where a straight line crosses 0, kept off the ends so that the interval shrinks: costs are nearly straight."""
    line = low + (high - low) * at_low / (at_low - at_high)
    edge = max((high - low) // 16, 1)
    return int(min(max(round(line), low + edge), high - edge))


def _outward(middle: int, low: int, high: int) -> Iterator[int]:
    """The integers between low and high, the nearest to `middle` first; 256 at most."""
    for distance in range(128):
        for n in {middle - distance, middle + distance}:
            if low < n < high:
                yield n


def _legal(at: Callable[[int], Any], values: Iterable[int]) -> int | None:
    return next((n for n in values if at(n) is not None), None)


def describe(solved: Mapping[str, Solved]) -> dict[str, Any]:
    """For plan.json: residuals, what was set, notes."""
    return {
        "residual": {name: s.residual for name, s in solved.items()},
        "set": {name: s.values for name, s in solved.items() if s.values},
        "notes": [note for s in solved.values() for note in s.notes],
    }
