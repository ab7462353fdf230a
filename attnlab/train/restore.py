"""A trained model out of a workdir."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab.errors import Damaged, UserError
from attnlab.evaluate.generate import Sampling
from attnlab.evaluate.perplexity import Evaluation, evaluate
from attnlab.train import metadata, workdir
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.config import RunConfig
from attnlab.train.loop import load_tokenizer, micro_batches
from attnlab.train.program import Program

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's model at one of its checkpoints.

    Attributes:
      config: the run's, as the checkpoint knows it, with the overrides.
      trained_on: where the loader stood when it was saved: tokenizer, digest and split of the data.
      trained_length: positions of the rows that it was trained on.
      named_other_data: whether an override names the data.
      notes: what whoever reads a figure of it must know.
    """

    config: RunConfig
    program: Program
    params: Any
    tokenizer: data_lib.Tokenizer
    step: int
    trained_on: dict[str, Any]
    trained_length: int
    named_other_data: bool
    notes: tuple[str, ...] = ()


def load(
    path: pathlib.Path, which: str = "best", overrides: list[str] | None = None, *, evaluating: bool = True
) -> Trained:
    """Restores a model. A damaged checkpoint is reported and set aside, and the one before it is taken.

    Args:
      path: workdir of a run.
      which: `best` (lowest held-out loss; the latest if none was evaluated), `latest`, or a step.
      overrides: `any.field=value`, e.g. other data to evaluate on.
      evaluating: whether batches of the config's shape will be run, which its mesh must then divide.

    Raises:
      UserError: no run, no such checkpoint, none that can be read, an override that is wrong, or a tokenizer that is
        not the one it was trained with.
    """
    overrides = overrides or []
    if metadata.read_config(path) is None:
        raise UserError(
            f"--workdir {path} holds no run (no config.json); "
            f"train one with: attnlab train --config ... --workdir {path}"
        )
    checkpoints = Checkpoints(path)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"--workdir {path} has no checkpoint yet; let the run go on to its first train.save_every")
    read = lambda step: _load(path, checkpoints, step, overrides, evaluating)
    if which in ("best", "latest"):
        order = checkpoints.best_first() if which == "best" else steps[::-1]
        with workdir.held_if_free(path) as free:
            return checkpoints.first_whole(order, read, log.warning, move=free)[1]
    if which not in map(str, steps):
        shown = config_lib.show(which)
        raise UserError(f"--checkpoint {shown} is not there; allowed: best, latest, {', '.join(map(str, steps))}")
    try:
        return read(int(which))
    except Damaged as error:
        others = ", ".join(str(s) for s in steps if s != int(which)) or "there is none"
        raise UserError(
            f"checkpoint {which} in {path} cannot be read: {error}\nchoose another with --checkpoint: {others}"
        ) from None


def _load(path: pathlib.Path, checkpoints: Checkpoints, step: int, overrides: list[str], evaluating: bool) -> Trained:
    host = checkpoints.host(step)
    old = copy.deepcopy(host.config)  # overrides are laid over the tree itself
    config = config_lib.build(RunConfig, config_lib.apply_overrides(host.config, overrides))
    if any(o.startswith("model.") for o in overrides):
        metadata.require_same_arrays(path, old, config, parameters_alone=True)
    tokenizer = load_tokenizer(config)
    named = any(o.startswith("data.source=") for o in overrides)
    notes = []
    if tokenizer.fingerprint() != host.data["tokenizer"]:
        if not named:
            raise UserError(
                f"data.tokenizer = {config.data.tokenizer!r} is not the tokenizer that checkpoint {step} in {path} was "
                "trained with, whatever its name: its ids mean other text\ngive that one with "
                "--config.data.tokenizer, or name other data, too, with --config.data.source"
            )
        notes.append("with another tokenizer than it was trained with")

    program = Program.of(config, batches=evaluating)
    params, _ = checkpoints.restore_params(step, program.params)
    trained_length = old["data"]["length"]
    return Trained(config, program, params, tokenizer, step, host.data, trained_length, named, tuple(notes))


def evaluate_heldout(trained: Trained, batches: int | None = None) -> tuple[Evaluation, list[str]]:
    """Held-out loss over all of the data's held-out batches, or the first `batches`; and what to know of it.

    Raises:
      UserError: the data is not that of the training, or split another way, and no override names other data.
    """
    config = trained.config
    loader = data_lib.heldout_loader(micro_batches(config), trained.tokenizer, batches=batches)
    notes = [*trained.notes, *_on_data(trained, loader.summary()["digest"]), *beyond(trained, config.data.length)]
    program = trained.program
    placed = (program.put(batch) for batch in loader)
    return evaluate(lambda batch: program.eval_step(trained.params, batch), placed, loader.bytes), notes


def _on_data(trained: Trained, digest: str) -> list[str]:
    """What to know of a figure on this data."""
    before, data = trained.trained_on, trained.config.data
    if digest == before["data"]:
        if data.heldout != before["heldout"]:
            raise UserError(
                f"data.heldout = {data.heldout} holds out text that checkpoint {trained.step} was trained on, with "
                f"{before['heldout']}; allowed: {before['heldout']}, or other data with --config.data.source"
            )
        return []
    if not trained.named_other_data:
        raise UserError(
            f"the text of data.source = {data.source!r} is not what checkpoint {trained.step} was trained on (digest "
            f"{digest[:12]}, was {before['data'][:12]}): what is held out of it may have been trained on\n"
            "restore it, or say that it is other data with --config.data.source"
        )
    return [f"on other data than it was trained on ({data.source})"]


def beyond(trained: Trained, length: int) -> list[str]:
    """What to know where `length` positions are more than the model was trained on."""
    if length <= trained.trained_length:
        return []
    return [f"{length:,} positions, and it was trained on rows of {trained.trained_length:,}"]


def prepare_prompts(
    tokenizer: data_lib.Tokenizer, sampling: Sampling, prompts: list[str], samples: int, stop: str
) -> tuple[Sampling, list[np.ndarray]]:
    """Prompts as ids, each `samples` times, and the sampling with its stop token.

    Args:
      stop: `eod`, `none`, or the text of one token.

    Raises:
      UserError: `stop` is not one token.
    """
    stop_id: int | None = tokenizer.eod_id
    if stop == "none":
        stop_id = None
    elif stop != "eod":
        ids = tokenizer.encode(stop)
        if len(ids) != 1:
            raise UserError(f"--stop {stop!r} is {len(ids)} tokens; allowed: eod, none, or the text of one token")
        stop_id = int(ids[0])
    start = np.asarray([tokenizer.eod_id], np.int32)
    ids = [np.concatenate([start, tokenizer.encode(p)]) for p in prompts for _ in range(samples)]
    return dataclasses.replace(sampling, stop=stop_id, vocab=tokenizer.vocab_size), ids
