"""A trained model out of a workdir."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab import models
from attnlab.errors import Damaged, UserError
from attnlab.evaluate.heldout import evaluate
from attnlab.train import metadata, workdir
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.config import RunConfig
from attnlab.train.program import Program, open_data

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's model at one of its checkpoints.

    Attributes:
      config: the run's, as the checkpoint knows it, with the overrides.
      data: of the config, opened.
      trained_on: where the loader stood when it was saved, and what its batches depended on.
      trained_length: positions of the rows that it was trained on.
      named_other_data: whether an override names the data.
      notes: what whoever reads a figure of it must know.
    """

    config: RunConfig
    program: Program
    params: Any
    data: data_lib.Data
    step: int
    trained_on: dict[str, Any]
    trained_length: int
    named_other_data: bool
    notes: tuple[str, ...] = ()


def load(
    path: pathlib.Path,
    which: str = "best",
    overrides: list[str] | None = None,
    *,
    evaluating: bool = True,
    ema: bool = False,
) -> Trained:
    """Restores a model. A damaged checkpoint is reported and set aside, and the one before it is taken.

    Args:
      path: workdir of a run.
      which: `best` (lowest held-out loss; the latest if none was evaluated), `latest`, or a step.
      overrides: `any.field=value`, e.g. other data to evaluate on.
      evaluating: whether batches of the config's shape will be run, which its mesh must then divide.
      ema: whether the averaged weights of `train.ema` take the place of the parameters.

    Raises:
      UserError: no run, no such checkpoint, none that can be read, an override that is wrong, or data that it
        cannot be run on.
    """
    overrides = overrides or []
    if metadata.read_config(path) is None:
        raise UserError(f"workdir {path} holds no run (no config.json); train one in it first")
    checkpoints = Checkpoints(path)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"workdir {path} has no checkpoint yet; let the run go on to its first train.save_every")
    read = lambda step: _load(path, checkpoints, step, overrides, evaluating, ema)
    if which in ("best", "latest"):
        order = checkpoints.best_first() if which == "best" else steps[::-1]
        free = lambda: workdir.held_if_free(path)
        return checkpoints.first_whole(order, read, log.warning, may_move=free)[1]
    if which not in map(str, steps):
        shown = config_lib.show(which)
        raise UserError(f"checkpoint {shown} is not there; allowed: best, latest, {', '.join(map(str, steps))}")
    try:
        return read(int(which))
    except Damaged as error:
        others = ", ".join(str(s) for s in steps if s != int(which)) or "there is none"
        raise UserError(f"checkpoint {which} in {path} cannot be read: {error}\nother checkpoints: {others}") from None


def _load(
    path: pathlib.Path, checkpoints: Checkpoints, step: int, overrides: list[str], evaluating: bool, ema: bool
) -> Trained:
    host = checkpoints.host(step)
    group, said = weights(path, step, host, ema)
    old = copy.deepcopy(host.config)  # overrides are laid over the tree itself
    config = config_lib.build(RunConfig, config_lib.apply_overrides(host.config, overrides))
    if any(o.startswith("model.") for o in overrides):
        metadata.require_same_arrays(path, old, config, parameters_alone=True)
    data = open_data(config)
    named = any(o.startswith(f"data.{field}=") for o in overrides for field in data.names_other)
    notes = data.require_readable(host.data, f"checkpoint {step} in {path}", named=named)

    program = Program.of(config, batches=evaluating)
    params, _ = checkpoints.restore_params(step, program.params, group=group)
    trained_length = config_lib.build(RunConfig, old).data.length
    return Trained(config, program, params, data, step, host.data, trained_length, named, (*notes, *said))


def weights(path: pathlib.Path, step: int, host: Host, ema: bool) -> tuple[str, list[str]]:
    """The group of a checkpoint's arrays that takes the parameters' place, and what to know of it.

    Raises:
      UserError: the averaged weights are asked for, and it has none.
    """
    decay = host.config["train"].get("ema")
    if not ema:
        return "params", []
    if not decay:
        raise UserError(
            f"checkpoint {step} in {path} has no averaged weights; allowed: one of a run with train.ema above 0"
        )
    return "ema", [f"of the averaged weights (train.ema = {decay})"]


def evaluate_heldout(trained: Trained, batches: int | None = None) -> tuple[models.Figures, list[str]]:
    """Figures over all of the data's held-out batches, or the first `batches`; and what to know of them.

    Raises:
      UserError: the data is not that of the training, or split another way, and no override names other data.
    """
    config, program = trained.config, trained.program
    data = trained.data.resized(config.data.batch // config.train.accumulate)
    heldout = data.heldout(batches=batches)
    known = data.require_heldout(
        heldout, trained.trained_on, f"checkpoint {trained.step}", named=trained.named_other_data
    )
    notes = [*trained.notes, *known, *beyond(trained, config.data.length)]
    placed = (program.put(batch) for batch in heldout)
    step = lambda batch: program.eval_step(trained.params, batch)
    return evaluate(program.model.objective, step, placed, heldout.facts()), notes


def evaluate_lengths(
    trained: Trained, multiples: Sequence[int], batches: int | None = None
) -> list[tuple[int, int, models.Figures]]:
    """Figures at multiples of `data.length`, each with that length: memory does not grow where a state is fixed.

    A batch has as many positions at each, so fewer rows of longer ones, and each is evaluated on as many batches.

    Args:
      multiples: of the length.
      batches: held-out batches at each; None: as many as hold all rows of the plain length.

    Raises:
      UserError: the data has no such rows, or the mesh does not divide a batch of one row.
    """
    c, ways, found = trained.config, trained.program.rows_ways, []
    rows = c.data.batch // c.train.accumulate
    for multiple in multiples:
        batch = max(1, rows // (multiple * ways)) * ways
        data = dataclasses.replace(c.data.longer(multiple), batch=batch)
        config = dataclasses.replace(c, data=data, train=dataclasses.replace(c.train, accumulate=1))
        at = dataclasses.replace(trained, config=config, program=Program.of(config), data=open_data(config))
        held = at.data.heldout(batches=batches)
        plain = len(trained.data.resized(rows).heldout(batches=batches))
        figures, _ = evaluate_heldout(at, min(plain, len(held)))
        found.append((multiple, data.length, figures))
    return found


def beyond(trained: Trained, length: int) -> list[str]:
    """What to know where `length` positions are more than the model was trained on."""
    if length <= trained.trained_length:
        return []
    return [f"{length:,} positions, and it was trained on rows of {trained.trained_length:,}"]
