"""Checkpoints by orbax: written in the background, the newest few and the best kept, a damaged one stepped over."""

from __future__ import annotations

import itertools
import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from attnlab.errors import UserError
from attnlab.train.processes import Processes
from attnlab.train.state import TrainState

_METRIC = "heldout_loss"
_SIZES = "sizes.json"


class Checkpoints:
    """The checkpoints of a workdir.

    A checkpoint holds the train state and a JSON of what lives on the host (data position, tokens seen). Its directory
    has its final name only once it is complete.

    Args:
      workdir: of the run.
      keep: newest checkpoints that are kept, besides the one with the lowest held-out loss.
      read_only: never clean up or write, as another process may be saving there.
      processes: those of the run, which all save and restore together; None: there is one.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int = 1,
        *,
        read_only: bool = False,
        processes: Processes | None = None,
    ):
        self._processes = processes
        # Orbax reports each save, and each failure with its whole stack; what matters to people is said by the loop.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = workdir.absolute() / "checkpoints"
        policy = checkpoint_managers
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(
                [
                    policy.LatestN(keep),
                    policy.BestN(
                        get_metric_fn=lambda m: m[_METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            # Without this orbax would not write the metrics down, and a resumed run would not know its best; with it,
            # it reads those of every checkpoint, which a reader of one does not need.
            best_fn=None if read_only else lambda metrics: metrics[_METRIC],
            best_mode="min",
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._open: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order; needs no orbax."""
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file, not a directory of checkpoints; use another --workdir")
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def save(self, step: int, state: TrainState, host: dict[str, Any], heldout_loss: float | None) -> None:
        """Copies the state and writes it in the background; an error of the last write is raised here."""
        self.wait()
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), host=ocp.args.JsonSave(host)),
            metrics=None if heldout_loss is None else {_METRIC: heldout_loss},
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the host's JSON of a step.

        Args:
          step: one of `steps()`.
          like: ShapeDtypeStructs with the shardings to restore to.

        Raises:
          UserError: a file is missing or of another size than when it was written.
          Exception: whatever orbax raises where arrays do not fit.
        """
        if (reason := self._damage(step)) is not None:
            raise UserError(reason)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(_plain(like)), host=ocp.args.JsonRestore()),
        )
        return TrainState(**restored["state"]), restored["host"]

    def restore_latest(
        self, like: TrainState, report: Callable[[str], None]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read; None if there is none at all.

        A damaged one is reported, and moved to `damaged_checkpoints` where an older one serves, so that its step can be
        saved again.

        Raises:
          UserError: there are checkpoints and none is whole, or a whole one does not fit; nothing is moved then.
        """
        steps = self.steps()
        damaged = {step: reason for step in steps if (reason := self._damage(step)) is not None}
        if steps and len(damaged) == len(steps):
            raise UserError(
                f"none of the checkpoints {', '.join(map(str, steps))} in {self.directory} is whole: "
                f"{damaged[steps[-1]]}\nrestore them, or start again with another --workdir"
            )
        self._together()  # all have looked
        for step, reason in damaged.items():
            moved = self._set_aside(step) if self._first else "damaged_checkpoints"
            report(f"checkpoint {step} is damaged ({reason}); moved to {moved}")
        self._together()
        whole = [step for step in steps if step not in damaged]
        if not whole:
            return None
        if damaged:
            report(f"going back to checkpoint {whole[-1]}")
        try:
            state, host = self.restore(whole[-1], like)
            jax.block_until_ready(state.params)
        except Exception as error:  # orbax and tensorstore raise whatever does not fit
            raise UserError(
                f"checkpoint {whole[-1]} in {self.directory} cannot be restored, though its files are whole: "
                f"{first_line(error)}\nif the model's code has changed, undo that or use another --workdir"
            ) from error
        return whole[-1], state, host

    def _set_aside(self, step: int) -> pathlib.Path:
        bin_ = self.directory.parent / "damaged_checkpoints"
        bin_.mkdir(exist_ok=True)
        target = next(t for i in itertools.count() if not (t := bin_ / (f"{step}-{i}" if i else str(step))).exists())
        shutil.move(self.directory / str(step), target)
        return target

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss among those kept and whole; None if none was evaluated."""
        losses = {}
        for step in self.steps():
            file = self.directory / str(step) / "metrics" / "metrics"
            if self._damage(step) is None and file.is_file():
                losses[step] = json.loads(file.read_text())[_METRIC]
        return min(losses, key=losses.__getitem__) if losses else None

    def wait(self) -> None:
        """Until the last save is on disk; raises what it raised."""
        if self._open is not None:
            self._open.wait_until_finished()
            self.poll()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        if self._open is not None:
            self.wait()
            self._open.close()
            self._open = None

    def poll(self) -> None:
        """If a save has just been completed, writes down the size of its files: orbax does not notice every cut."""
        if self._saving is None or self._manager.is_saving_in_progress():
            return
        if not self._first:
            self._saving = None
            return
        directory = self.directory / str(self._saving)
        sizes = {str(p.relative_to(directory)): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
        new = directory / f"{_SIZES}.new"
        new.write_text(json.dumps(sizes))
        new.replace(directory / _SIZES)
        self._saving = None

    def _damage(self, step: int) -> str | None:
        """Which file of a checkpoint is not as it was written; None if all are."""
        directory = self.directory / str(step)
        try:
            sizes = json.loads((directory / _SIZES).read_text())
        except FileNotFoundError:  # killed between the last write and the list: what has its final name is complete
            return None
        except ValueError:
            return f"{_SIZES} is cut off"
        for name, size in sizes.items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                return f"{name} has {found if found is not None else 'no'} bytes instead of {size}"
        return None

    @property
    def _first(self) -> bool:
        return self._processes is None or self._processes.first

    def _together(self) -> None:
        if self._processes is not None:
            self._processes.barrier()

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._open is None:
            self._open = ocp.CheckpointManager(self.directory, options=self._options)
        return self._open


def _plain(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in TrainState.__dataclass_fields__}


def first_line(error: BaseException) -> str:
    """The start of an exception's message, for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
