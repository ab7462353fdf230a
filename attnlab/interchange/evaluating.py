"""A run's language model on tasks of lm-evaluation-harness, and the file that keeps what they came to."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from attnlab import memory, paths
from attnlab.errors import UserError
from attnlab.evaluate.scorer import Scorer
from attnlab.train import hardware, restore
from attnlab.train.program import Program


@dataclasses.dataclass(frozen=True)
class Done:
    """What was found, for JSON, and the file that has it."""

    said: dict[str, Any]
    path: pathlib.Path


def run(
    workdir: pathlib.Path, tasks: Sequence[str], *, checkpoint: str = "best", limit: int | None = None,
    fewshot: int | None = None, seed: int = 0, out: pathlib.Path | None = None, overrides: list[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Done:  # fmt: skip
    """Evaluates, and writes the figures.

    Args:
      workdir: of a run of a language model, of any mixers.
      tasks: see `attnlab.interchange.harness_tasks.Tasks`.
      checkpoint, overrides: see `attnlab.train.restore.load`; `data.length` says how much the model reads at most.
      limit, fewshot: see `attnlab.interchange.harness.evaluate`.
      seed: of texts that are drawn.
      out: a new file; None: `eval/lm_eval-STEP.json` of the workdir, in which these tasks replace what was found for
        them, and what it has of others stays.
      say: called with what is worth knowing meanwhile.

    Raises:
      UserError: `lm_eval` is not installed, the run is of no language model over text, a task cannot be run, or the
        file cannot be written.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval needs lm_eval, which is not installed; pip install 'attnlab[lm-eval]'")
    if out is not None:
        paths.require_new_file(str(out), overwrite=False)
    from attnlab.interchange import harness
    from attnlab.interchange.harness_tasks import Tasks

    # Named wrongly, tasks are refused before the model is read.
    held: list[Any] = []
    found = Tasks(tasks, lambda: held[0].heldout_texts())
    trained = restore.load(workdir, checkpoint, overrides)
    c, program = trained.config, trained.program
    if not program.model.objective.decodes or trained.data.tokenizer is None:
        raise UserError(
            f"workdir {workdir} holds a model of kind {c.model.node_name!r} on data {trained.data.name!r}; allowed: "
            "a language model on text"
        )
    hardware.require_memory(c, memory.size(program.batch), memory.size(trained.params))
    held.append(trained.data)
    notes = [*trained.notes, *restore.beyond(trained, c.data.length)]
    if found.ours:
        heldout = trained.data.heldout(batches=1)
        who = f"checkpoint {trained.step}"
        notes += trained.data.require_heldout(heldout, trained.trained_on, who, named=trained.named_other_data)
    scorer = scorer_of(program, trained.params)
    adapter = harness.Adapter(scorer, trained.data.tokenizer, seed, lambda text: (notes.append(text), say(text)))
    entries = harness.evaluate(adapter, found, limit=limit, fewshot=fewshot)
    if scorer.counts.truncated:
        notes.append(
            f"{scorer.counts.truncated:,} contexts were longer than {c.data.length:,} positions: cut on the left"
        )
    said = {
        "step": trained.step, "length": c.data.length, "harness": harness.version(), "seed": seed, "tasks": entries,
        "notes": notes,
    }  # fmt: skip
    path = workdir / "eval" / f"lm_eval-{trained.step}.json" if out is None else out
    _write(path, said, new=out is not None)
    return Done(said, path)


def scorer_of(program: Program, params: Any) -> Scorer:
    """The scorer of a run's model: as many positions at a time as training holds, spread over the same mesh."""
    c = program.config
    return Scorer(
        program.model.merge, params, c.data.length, c.data.batch // c.train.accumulate,
        {"loss_chunk": c.train.loss_chunk, "loss_impl": c.train.loss_impl},
        traced=program.traced, streamed=program.streamed, ways=program.rows_ways,
        whole=program.mesh.shape["context"] > 1,
    )  # fmt: skip


def _write(path: pathlib.Path, said: dict[str, Any], *, new: bool) -> None:
    """Each task with what it was run with, so that one file holds those of several commands."""
    shared = {key: said[key] for key in ("length", "harness", "seed", "notes")}
    tasks: dict[str, Any] = {}
    if path.exists() and not new:
        try:
            tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not what this verb writes; move it away, or name another, new file") from None
    tasks |= {name: entry | shared for name, entry in said["tasks"].items()}
    with paths.file_beside(str(path), lambda: paths.require_new_file(str(path), overwrite=not new)) as beside:
        text = json.dumps({"step": said["step"], "tasks": tasks}, indent=1, sort_keys=True) + "\n"
        pathlib.Path(beside).write_text(text, encoding="utf-8")
