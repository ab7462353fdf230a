"""Checkpoints by orbax: written in the background with digests, the newest few and the best kept, damaged ones stepped
over."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from attnlab import storage
from attnlab.errors import Damaged, UserError, first_line
from attnlab.train import chunks, digests, files, noise, orbax, workdir
from attnlab.train.late import ocp
from attnlab.train.processes import Processes
from attnlab.train.state import TrainState

T = TypeVar("T")

_TEMPORARY = ".orbax-checkpoint-tmp"
_HOST = "host/metadata"  # the file of the item `host`
_METADATA = "_CHECKPOINT_METADATA"
_UPLOAD_SECONDS = 3600  # for which processes wait for each other's uploads


@dataclasses.dataclass(frozen=True)
class Host:
    """What a checkpoint holds besides arrays.

    Attributes:
      tokens: trained on so far.
      data: position in the data and what that depends on, of `Loader.get_state`.
      config: the run's config, as a tree.
      heldout_loss: of the evaluation at this step; None if there was none.
    """

    tokens: int
    data: dict[str, Any]
    config: dict[str, Any]
    heldout_loss: float | None = None


class Checkpoints:
    """The checkpoints of a workdir.

    A checkpoint holds the train state, a JSON of what lives on the host (`Host`) and the digests of its files. Its
    directory has its final name only once it is complete. In a bucket it is complete once its digests are there, which
    are written last; here, in the staging directory, are only files that are being written or read.

    Args:
      path: the workdir, or the staging directory of one in a bucket.
      keep: newest checkpoints that are kept, besides the one with the lowest held-out loss.
      processes: those of the run, which all save and restore together; None: there is one.
    """

    def __init__(self, path: pathlib.Path, keep: int = 1, *, processes: Processes | None = None):
        self._processes, self._keep = processes, keep
        noise.keep_out()
        self._workdir = path.absolute()
        self.directory = self._workdir / "checkpoints"
        remote = storage.mirrored(path)
        self._remote = None if remote is None else remote.checkpoints
        self._open: ocp.AsyncCheckpointer | None = None
        self._saving: int | None = None
        self._removing: threading.Thread | None = None
        self._losses: dict[int, float | None] = {}  # what is written does not change

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order; needs no orbax.

        Raises:
          UserError: `checkpoints` is no directory.
        """
        if self._remote is not None:
            return self._remote.steps()
        if not self.directory.is_symlink() and not self.directory.exists():
            return []
        try:
            names = os.listdir(self.directory)
        except NotADirectoryError:
            what = files.kind(self.directory.lstat().st_mode)
            raise UserError(
                f"{self.directory} is {what}, not a directory of checkpoints; use another workdir"
            ) from None
        except OSError as error:
            raise UserError(f"{self.directory} cannot be read: {error.strerror}; use another workdir") from None
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))

    def agreed_steps(self) -> list[int]:
        """`steps` as the first process sees them, in every one: another run may write here. All call it together."""
        if self._processes is None:
            return self.steps()
        return json.loads(self._processes.gather(json.dumps(self.steps() if self._first else []))[0])

    # Writing.

    def save(self, step: int, state: TrainState, host: Host) -> None:
        """Copies the state and writes it in the background; an error of the last write is raised here."""
        self.wait()
        if self._open is None:
            self._open = self._opened()
        self._saving = step
        known = {"step": step, **dataclasses.asdict(host)}
        args = {"state": ocp.args.StandardSave(_plain(state)), "host": ocp.args.JsonSave(known)}
        with self._fatal(step):
            self._open.save(self.directory / str(step), args=ocp.args.Composite(**args))

    def poll(self) -> None:
        """Raises what the save in the background has raised, if anything; tidies up after one that is done.

        Raises:
          UserError: the save failed.
        """
        if self._saving is None or self._open is None:
            return
        with self._fatal(self._saving):
            self._open.check_for_errors()
        if (self.directory / str(self._saving) / digests.NAME).exists():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk; raises as `poll`."""
        if self._saving is None or self._open is None:
            return
        with self._fatal(self._saving):
            self._open.wait_until_finished()
            if not (self.directory / str(self._saving)).is_dir():
                raise FileNotFoundError("it is not there")
            if self._remote is not None:
                self._remote.committed(self._saving)
            if self._first:
                self._remove(self._superseded())
        self._saving = None

    def close(self) -> None:
        """Waits for what is being written and lets go of it. For errors use `wait`: here something else may be one."""
        with contextlib.suppress(Exception):
            self.wait()
        if self._removing is not None:
            self._removing.join()
        if self._open is not None:
            self._open.close()
            self._open = None

    @contextlib.contextmanager
    def _fatal(self, step: int) -> Any:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise whatever the disk leads to
            self._saving = self._open = None  # nothing is waited for any more
            good = [s for s in self.steps_or_none() if s != step]
            kept = f"the newest complete checkpoint is {good[-1]}" if good else "there is no complete checkpoint"
            raise UserError(
                f"checkpoint {step} could not be written to {self.directory}: "
                f"{workdir.disk_trouble(error) or first_line(error)}; {kept}"
            ) from error

    def steps_or_none(self) -> list[int]:
        """`steps`, or none where that cannot be told."""
        with contextlib.suppress(OSError, UserError):
            return self.steps()
        return []

    def _opened(self) -> ocp.AsyncCheckpointer:
        if self._first and self._remote is not None:
            self._remote.remove_incomplete()
        if self._first or self._remote is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            stale = [p for p in self.directory.iterdir() if re.fullmatch(rf"\d+({_TEMPORARY}.*|\.removed)", p.name)]
            for path in stale:  # of a process that was killed
                files.delete(path)
        self._together()
        apart = self._remote is not None and self._count > 1
        seconds = 600 if self._remote is None else _UPLOAD_SECONDS
        return orbax.checkpointer(self._write_digests, apart=apart, seconds=seconds)

    def _write_digests(self) -> None:
        """Called by orbax's thread when all is written, before the directory gets its final name."""
        (directory,) = self.directory.glob(f"{self._saving}{_TEMPORARY}*")
        digests.write(directory)
        if self._remote is not None:
            index = 0 if self._processes is None else self._processes.index
            write = lambda listed: digests.write_listed(directory, listed)
            self._remote.commit(self._saving, directory, index, self._count, write)

    def _superseded(self) -> list[int]:
        steps = self.steps()
        best = self._by_loss(steps)[:1]
        return [step for step in steps[: -self._keep] if step not in best]

    def _remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints, in the background: renamed first, so that none is ever there in part."""
        removals: list[Callable[[], None]] = []
        for step in steps:
            if self._remote is not None:
                removals.append(self._remote.remove(step))
                continue
            target = self.directory / f"{step}.removed"
            (self.directory / str(step)).rename(target)
            removals.append(functools.partial(files.delete, target))
        if self._removing is not None:
            self._removing.join()
        self._removing = threading.Thread(target=lambda: [remove() for remove in removals], daemon=True)
        self._removing.start()

    # Reading.

    def host(self, step: int) -> Host:
        """What a checkpoint holds besides arrays.

        Raises:
          Damaged: a file of it is missing or of another size, or this one's content is not what was written, or it is
            of another step than its name says.
        """
        directory = self.directory / str(step)
        if self._remote is not None:
            self._remote.fetch(step, only=(digests.NAME, _HOST, _METADATA))
        digests.check_sizes(directory, None if self._remote is None else self._remote.sizes(step))
        digests.check_file(directory, _HOST)
        with contextlib.suppress(FileNotFoundError):
            files.read_json(directory / _METADATA)
        known = files.read_json(directory / _HOST)
        if known.pop("step", None) != step:
            raise Damaged("it was saved at another step")
        try:
            return Host(**known)
        except TypeError as error:
            raise UserError(f"{directory} is of another version of attnlab: {error}") from None

    def agreed_host(self, step: int) -> Host:
        """`host`; Damaged in every process where it is raised in one. All call it together."""
        return self._agreed(lambda: self.host(step))

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Host]:
        """The state of a step and what lives on the host. The content of all files is checked meanwhile.

        Args:
          step: one of `steps()`.
          like: ShapeDtypeStructs with the shardings to restore to.

        Raises:
          Damaged: a file is not what was written.
          UserError: all are, but the arrays are not those of `like`.
        """
        args = ocp.args.StandardRestore(_plain(like))
        restored, host = self._restored(step, _plain(like), lambda path: orbax.read_state(path, args))
        return TrainState(**restored), host

    def restore_params(self, step: int, like: Any, *, group: str = "params", part: bool = False) -> tuple[Any, Host]:
        """The parameters of a step alone, no optimizer's moments in memory, and what lives on the host.

        Arguments and errors as `restore`, `like` being of the parameters; with `part`, of some of them; with
        `group="ema"` of the averaged ones, which are restored.
        """
        read = lambda path: orbax.read_group(path, group, like, part=part)
        return self._restored(step, {group: like}, read)

    def _restored(self, step: int, like: Any, read: Callable[[pathlib.Path], T]) -> tuple[T, Host]:
        """What `read` makes of a checkpoint's directory with the files for `like`, while these are checked."""
        host = self._agreed(lambda: self.host(step))
        directory = self.directory / str(step)
        if self._remote is None:
            outcome = digests.verifying(directory, self._share)
        else:
            bring = lambda only: self._remote.fetch(step, only=only)
            outcome = digests.verifying(directory, names=self._agreed(lambda: chunks.fetched(directory, like, bring)))
        if self._count > 1:  # none may wait inside orbax for one that found damage
            self._agreed(lambda: _raise_damage(outcome()))
        try:
            restored = read(directory)
            jax.block_until_ready(restored)
        except Exception as error:  # orbax and tensorstore raise whatever the damage, or what does not fit, leads to
            _raise_damage(outcome())
            raise UserError(
                f"checkpoint {step} in {self.directory} cannot be restored, though its files are whole: "
                f"{first_line(error)}\nif the model's code has changed, undo that or use another workdir"
            ) from error
        _raise_damage(outcome())
        if self._remote is not None:
            self._remote.drop(step)
        return restored, host

    def first_whole(
        self,
        steps: list[int],
        load: Callable[[int], T],
        report: Callable[[str], None],
        *,
        may_move: Callable[[], contextlib.AbstractContextManager[bool]] = lambda: contextlib.nullcontext(True),
    ) -> tuple[int, T] | None:
        """The first of `steps` that is whole, and what `load(step)` makes of it; None if there are no steps.

        Damaged ones before it are reported, and moved to `damaged_checkpoints`, so that their step can be saved again.

        Args:
          steps: the one that is wanted most first.
          load: raises Damaged where the checkpoint is.
          report: is told what is stepped over.
          may_move: entered to move some: whether this process may; one that only reads may not while another trains.

        Raises:
          UserError: there are steps and none is whole; nothing is moved then. Whatever else `load` raises.
        """
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                loaded = load(step)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._step_over(damaged, report, may_move)
            if damaged:
                report(f"going back to checkpoint {step}")
            return step, loaded
        if steps:
            raise UserError(
                f"none of the checkpoints {', '.join(map(str, sorted(steps)))} in {self.directory} is whole: "
                f"{damaged[steps[0]]}\nrestore them, or start again with another workdir"
            )
        return None

    def newest_host(self, report: Callable[[str], None], last: int) -> tuple[int, Host] | None:
        """The newest step whose files are all there, and what it holds besides arrays; see `newest`.

        From the step `last` on, which no training restores, the content of all its files is checked, too.
        """

        def load(step: int) -> Host:
            host = self.agreed_host(step)
            if step >= last:
                if self._remote is not None:
                    self._agreed(lambda: self._remote.fetch(step))
                self._agreed(lambda: _raise_damage(digests.verifying(self.directory / str(step), self._share)()))
            return host

        return self.newest(report, load)

    def newest(self, report: Callable[[str], None], load: Callable[[int], T]) -> tuple[int, T] | None:
        """`first_whole` of all steps, the newest first; older ones whose files are not all there are set aside, too."""
        steps = self.steps()[::-1]
        found = self.first_whole(steps, load, report)
        if found is not None:
            older = {step: reason for step in steps if step < found[0] and (reason := self._unreadable(step))}
            self._step_over(older, report)
        return found

    def best_first(self) -> list[int]:
        """Steps by held-out loss, the lowest first; then those that were not evaluated, the newest first."""
        steps = self.steps()
        evaluated = self._by_loss(steps)
        # What cannot be read may be the best: whoever loads it finds the damage, and reports it.
        unreadable = [step for step in steps[::-1] if self._unreadable(step)]
        return [*unreadable, *evaluated, *(s for s in steps[::-1] if s not in (*evaluated, *unreadable))]

    def _by_loss(self, steps: list[int]) -> list[int]:
        for step in steps:
            if step not in self._losses and not self._unreadable(step):
                self._losses[step] = self.host(step).heldout_loss
        known = {s: loss for s in steps if (loss := self._losses.get(s)) is not None and math.isfinite(loss)}
        return sorted(known, key=known.__getitem__)

    def _unreadable(self, step: int) -> str:
        try:
            self.host(step)
        except Damaged as error:
            return str(error)
        return ""

    def _step_over(
        self,
        damaged: dict[int, str],
        report: Callable[[str], None],
        may_move: Callable[[], contextlib.AbstractContextManager[bool]] = lambda: contextlib.nullcontext(True),
    ) -> None:
        self._together()  # all have looked
        with may_move() if damaged else contextlib.nullcontext(False) as may:
            for step, reason in damaged.items():
                where = self._set_aside(step) if self._first and may else ""
                report(f"checkpoint {step} is damaged ({reason}){where}")
        self._together()
        if damaged and self._remote is not None:
            self._remote.look_again()

    def _set_aside(self, step: int) -> str:
        if self._remote is not None:
            return f"; moved to {self._remote.set_aside(step)}"
        bin_ = self._workdir / "damaged_checkpoints"
        try:
            bin_.mkdir(exist_ok=True)
            names = (bin_ / (f"{step}-{i}" if i else str(step)) for i in itertools.count())
            target = next(name for name in names if not os.path.lexists(name))
            os.rename(self.directory / str(step), target)
        except OSError as error:
            return f"; it cannot be moved to {bin_}: {error.strerror}"
        return f"; moved to {target}"

    # Several processes.

    @property
    def _share(self) -> slice:
        """Which of many files this process reads: each its own, where all have fetched them."""
        if self._processes is None or self._remote is not None:
            return slice(None)
        return slice(self._processes.index, None, self._processes.count)

    @property
    def _count(self) -> int:
        return 1 if self._processes is None else self._processes.count

    @property
    def _first(self) -> bool:
        return self._processes is None or self._processes.first

    def _together(self) -> None:
        if self._processes is not None:
            self._processes.barrier()

    def _agreed(self, read: Callable[[], T]) -> T:
        """What `read` gives; Damaged in every process where it is raised in one."""
        found, reason = None, ""
        try:
            found = read()
        except Damaged as error:
            reason = str(error)
        reasons = [reason] if self._processes is None else self._processes.gather(reason)
        _raise_damage(next(filter(None, reasons), ""))
        return found  # type: ignore[return-value]


def _raise_damage(reason: str) -> None:
    if reason:
        raise Damaged(reason)


def _plain(state: TrainState) -> dict[str, Any]:
    return {name: value for name in TrainState.__dataclass_fields__ if (value := getattr(state, name)) is not None}
