"""A trained model out of a workdir."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from attnlab import config as config_lib
from attnlab import data as data_lib
from attnlab.errors import UserError
from attnlab.evaluate.generate import Sampling
from attnlab.evaluate.perplexity import Evaluation, evaluate
from attnlab.train import metadata, optimizers, sharding
from attnlab.train.checkpoints import Checkpoints, first_line
from attnlab.train.config import RunConfig
from attnlab.train.loop import load_tokenizer, micro_batches
from attnlab.train.state import Model, init_state, state_shardings
from attnlab.train.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's model at one of its checkpoints."""

    config: RunConfig
    model: Model
    params: Any
    tokenizer: data_lib.Tokenizer
    mesh: jax.sharding.Mesh
    step: int


def read_run(path: pathlib.Path, overrides: list[str]) -> RunConfig:
    """The config of the run in a workdir, with overrides.

    Raises:
      UserError: there is no run; an override is wrong.
    """
    tree = metadata.read_config(path)
    if tree is None:
        raise UserError(
            f"--workdir {path} holds no run (no config.json); "
            f"train one with: attnlab train --config ... --workdir {path}"
        )
    old = copy.deepcopy(tree)  # overrides are laid over the tree itself
    config = config_lib.build(RunConfig, config_lib.apply_overrides(tree, overrides))
    if any(o.startswith(("model.", "optimizer")) for o in overrides):
        metadata.require_same_arrays(path, old, config)
    return config


def load(
    path: pathlib.Path, which: str = "best", overrides: list[str] | None = None, *, evaluating: bool = True
) -> Trained:
    """Restores a model.

    Args:
      path: workdir of a run.
      which: `best` (lowest held-out loss; the latest if none was evaluated), `latest`, or a step.
      overrides: `any.field=value`, e.g. other data to evaluate on.
      evaluating: whether batches of the config's shape will be run, which its mesh must then divide.

    Raises:
      UserError: no run, no such checkpoint, or one that cannot be read.
    """
    config = read_run(path, overrides or [])
    tokenizer = load_tokenizer(config)
    checkpoints = Checkpoints(path, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"--workdir {path} has no checkpoint yet; let the run go on to its first train.save_every")
    if which == "latest":
        step = steps[-1]
    elif which == "best":
        best = checkpoints.best_step()
        step = steps[-1] if best is None else best
    elif which in map(str, steps):
        step = int(which)
    else:
        raise UserError(
            f"--checkpoint {config_lib.show(which)} is not there; allowed: best, latest, {', '.join(map(str, steps))}"
        )

    rows, length = (config.data.batch // config.train.accumulate, config.data.length) if evaluating else (0, 0)
    mesh = sharding.make_mesh(config.mesh, rows, length=length)
    model = Model.of(config.model)
    tx = optimizers.build(config.optimizer, config.train.steps, model.axes)
    shapes = jax.eval_shape(lambda: init_state(model, tx, config.seed))
    like = jax.tree.map(
        lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, state_shardings(mesh, model, tx)
    )
    try:
        state, _ = checkpoints.restore(step, like)
    except Exception as error:  # orbax and tensorstore raise whatever the damage leads to
        raise UserError(
            f"checkpoint {step} in {path} cannot be read: {first_line(error)}\n"
            f"choose another with --checkpoint: {', '.join(str(s) for s in steps if s != step) or 'there is none'}"
        ) from None
    finally:
        checkpoints.close()
    return Trained(config, model, state.params, tokenizer, mesh, step)


def evaluate_heldout(trained: Trained, batches: int | None = None) -> Evaluation:
    """Held-out loss over all of the data's held-out batches, or the first `batches`."""
    config = trained.config
    loader = data_lib.heldout_loader(micro_batches(config), trained.tokenizer, batches=batches)
    lengths = trained.tokenizer.byte_lengths()
    step = jax.jit(make_eval_step(trained.model, config.train, lengths, trained.mesh))
    return evaluate(lambda batch: step(trained.params, batch), (sharding.put_batch(b, trained.mesh) for b in loader))


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
