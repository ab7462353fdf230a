"""Checkpoints on the hosts' own disks: every few steps, beside those of the workdir, which are dearer and fewer.

Each process writes its pieces of the state, and those of the process before it that nobody else has: what one host
loses another still holds. They are for the same mesh and the same processes; the workdir's restore on any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from attnlab import storage
from attnlab.errors import Damaged, UserError, first_line
from attnlab.train import digests, files, metadata, metrics, workdir
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.pieces import Layout, Piece
from attnlab.train.processes import Processes
from attnlab.train.state import TrainState

_KEPT = 2  # while one is written the one before is what every process has
_OWN, _PASSED, _ABOUT, _LINES = "own", "passed", "about.json", "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class _Found:
    """A checkpoint on this process's disk: `writer` wrote it, `attempt` tells two of the same step apart."""

    step: int
    attempt: str
    writer: int
    path: pathlib.Path


class LocalCheckpoints:
    """The checkpoints of a run on the disks of its hosts. All processes call all methods alike.

    Args:
      place: directory on this host, which other runs may use, too.
      path: the workdir.
      layout: of the state.
      processes: of the run.

    Raises:
      UserError: the directory cannot be used, or has no room for three of them.
    """

    def __init__(self, place: pathlib.Path, path: pathlib.Path, layout: Layout, processes: Processes):
        self._layout, self._processes, self._index = layout, processes, processes.index
        self._metrics, self._remote = path / _LINES, storage.mirrored(path)
        self._attempt, run = processes.gather(secrets.token_hex(8))[0], processes.gather(_run_id(path, processes))[0]
        self._place = place.absolute() / run
        self._own = self._place / f"process{self._index}"
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._own).free
        except OSError as error:
            raise UserError(f"train.local_checkpoint_dir = {place} cannot be used: {error.strerror}") from None
        needed = (_KEPT + 1 - len(self._newest_own())) * layout.bytes_of(self._index)
        if free < needed:
            raise UserError(
                f"train.local_checkpoint_dir = {place} has {free / 1e6:,.1f} MB free; local checkpoints of this run "
                f"need {needed / 1e6:,.1f} MB on this host\nfree some, name another disk, or set "
                "train.local_checkpoint_every=0"
            )
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0
        self._resumed: int | None = None

    # Writing.

    def save(self, step: int, state: TrainState, host: Host) -> None:
        """Copies the state to the host's memory, and writes it in the background.

        Raises:
          UserError: the last one could not be written.
        """
        self.wait()
        self._processes.barrier()  # the one before is complete on all: what is older may go
        if self._resumed is not None:  # what an earlier attempt saved after that comes again
            self._remove_unless(lambda found: found.step <= self._resumed)
            self._resumed = None
        own, passed = self._layout.held[self._index], self._layout.passed[self._index - 1]
        content = {_OWN: self._layout.pull(state, own, self._index)}
        if passed:
            content[_PASSED] = self._layout.pull_passed(state, self._index)
        if self._remote is not None and self._processes.first:  # a kill takes those that are not in the bucket yet
            content[_LINES] = [np.frombuffer(self._remote.recent(_LINES), np.uint8)]
        about = {"step": step, "attempt": self._attempt, "writer": self._index, "layout": self._layout.digest}
        about["host"] = dataclasses.asdict(host)
        self._step = step
        self._writing = threading.Thread(target=self._write, args=(step, content, about), daemon=True)
        self._writing.start()

    def poll(self) -> None:
        """Raises UserError where the write in the background failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(
                f"local checkpoint {self._step} could not be written to {self._own}: "
                f"{workdir.disk_trouble(error) or first_line(error)}; free that disk, or go on without: "
                "train.local_checkpoint_every=0"
            ) from error

    def wait(self) -> None:
        """Until the last save is on disk; raises as `poll`."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self.poll()

    def close(self) -> None:
        """Waits for what is being written; for errors use `wait`."""
        with contextlib.suppress(UserError):
            self.wait()

    def remove(self) -> None:
        """Removes all of this run: it is complete, and its last checkpoint is in the workdir."""
        self.close()
        self._processes.barrier()
        _remove(self._place)

    def _write(self, step: int, content: dict[str, list[np.ndarray]], about: dict[str, Any]) -> None:
        try:
            new, final = self._own / f"{step}.new", self._own / str(step)
            _remove(new)
            new.mkdir(parents=True)
            for name, arrays in content.items():
                with (new / name).open("xb") as file:
                    for array in arrays:
                        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                    file.flush()
                    os.fsync(file.fileno())
            files.replace(new / _ABOUT, json.dumps(about))
            digests.write(new)
            _remove(final)
            new.rename(final)
            self._remove_unless(lambda found: found.step in self._newest_own())
        except BaseException as error:  # told by the thread that steps
            self._error = error

    def _newest_own(self) -> list[int]:
        return sorted((f.step for f in self._listed() if f.writer == self._index), reverse=True)[:_KEPT]

    # Reading.

    def newest(self, least: int, tell: Callable[[str], None]) -> tuple[int, TrainState, Host] | None:
        """The newest checkpoint that the processes have all pieces of, if its step is at least this one.

        What a process lacks others send to it. Damaged ones are told of and set aside.
        """
        said: set[str] = set()
        while True:
            found, reasons = self._usable(least)
            mine = {f"{f.step}/{f.attempt}": [] for f in found}
            for f in found:
                mine[f"{f.step}/{f.attempt}"].append(f.writer)
            told = [json.loads(text) for text in self._processes.gather(json.dumps([mine, reasons]))]
            for reason in dict.fromkeys(reason for _, reasons in told for reason in reasons if reason not in said):
                said.add(reason)
                tell(reason)
            name, plan = self._plan([have for have, _ in told], least, tell)
            if plan is None:
                return None
            here = {f.writer: f for f in found if f"{f.step}/{f.attempt}" == name}
            damaged = [reason for reason in self._processes.gather(self._damage(here)) if reason]
            for reason in damaged:
                tell(reason)
            if not damaged:
                break
        if self._processes.first and self._index in here and (lines := here[self._index].path / _LINES).exists():
            metrics.complete(self._metrics, lines.read_bytes())
        content, host = self._collect(here, plan)
        step, lent = int(name.split("/")[0]), sorted((r, s) for s, r in plan if s != r)
        tell(
            f"local checkpoint {step} is the newest" + "".join(f"; process {r} takes pieces from {s}" for r, s in lent)
        )
        return step, self._layout.place(content, self._index), host

    def resumed(self, step: int) -> None:
        """The run goes on from this step; with the next save later ones, of earlier attempts, go."""
        self._resumed = step

    def _usable(self, least: int) -> tuple[list[_Found], list[str]]:
        """What is on this disk for this layout, and what is to be told of the rest."""
        good, reasons = [], []
        for found in self._listed():
            try:
                digests.check_sizes(found.path)
                digests.check_file(found.path, _ABOUT)
                about = files.read_json(found.path / _ABOUT)
                if (about["step"], about["writer"]) != (found.step, found.writer):
                    raise Damaged("it was saved at another step or by another process")
            except (Damaged, KeyError, FileNotFoundError) as error:
                reasons.append(self._set_aside(found, str(error)))
                continue
            if about["layout"] == self._layout.digest:
                good.append(dataclasses.replace(found, attempt=about["attempt"]))
            elif found.step >= least:
                reasons.append(
                    f"local checkpoint {found.step} is of another mesh, model or optimizer, and is left: local ones "
                    "restore on the same alone, those of the workdir on any mesh"
                )
        return good, reasons

    def _damage(self, here: dict[int, _Found]) -> str:
        """Compares what this process has with its digests; what differs is set aside, and told."""
        told = []
        for found in here.values():
            if reason := digests.verifying(found.path)():
                told.append(self._set_aside(found, reason))
        return "\n".join(told)

    def _set_aside(self, found: _Found, reason: str) -> str:
        target = self._place / f"damaged-{found.step}-process{found.writer}"
        with contextlib.suppress(FileNotFoundError):  # by another process of this host
            if found.path.exists():
                _remove(target)
            found.path.rename(target)
        return f"local checkpoint {found.step} of process {found.writer} is damaged ({reason}); it is now {target}"

    def _plan(
        self, have: Sequence[dict[str, list[int]]], least: int, tell: Callable[[str], None]
    ) -> tuple[str, dict[tuple[int, int], list[Piece]] | None]:
        """The newest checkpoint that is whole among all, and by (sender, receiver) which pieces go where."""
        names = sorted({name for each in have for name in each}, key=lambda name: (int(name.split("/")[0]), name))
        for name in reversed(names):
            if int(name.split("/")[0]) < least:
                break
            plan, missing = self._sources([each.get(name, []) for each in have])
            if not missing:
                return name, plan
            tell(
                f"local checkpoint {name.split('/')[0]} is not whole: pieces of process "
                f"{', '.join(map(str, missing))} are on no disk"
            )
        return "", None

    def _sources(self, writers: Sequence[list[int]]) -> tuple[dict[tuple[int, int], list[Piece]], list[int]]:
        """Who gives which pieces to whom, where each process has what these processes wrote; whose are missing."""
        count = len(writers)
        holds = [{p.key for w in each for _, p in self._written(w)} for each in writers]
        plan: dict[tuple[int, int], list[Piece]] = {}
        missing: dict[int, None] = {}
        for receiver in range(count):
            for piece in self._layout.held[receiver]:
                order = ((receiver + ahead) % count for ahead in range(count))
                sender = next((q for q in order if piece.key in holds[q]), None)
                if sender is None:
                    missing[receiver] = None
                else:
                    plan.setdefault((sender, receiver), []).append(piece)
        return plan, list(missing)

    def _written(self, writer: int) -> list[tuple[str, Piece]]:
        """The pieces in what a process writes, each with its file, in order."""
        passed = self._layout.passed[writer - 1]
        return [*((_OWN, p) for p in self._layout.held[writer]), *((_PASSED, p) for p in passed)]

    def _collect(
        self, here: dict[int, _Found], plan: dict[tuple[int, int], list[Piece]]
    ) -> tuple[dict[Any, np.ndarray], Host]:
        """This process's pieces by key, and what lives on the host; gives others what they need."""
        places: dict[Any, tuple[pathlib.Path, int]] = {}
        for writer, found in here.items():
            at = {_OWN: 0, _PASSED: 0}
            for name, piece in self._written(writer):
                places.setdefault(piece.key, (found.path / name, at[name]))
                at[name] += piece.size
        read = lambda pieces: b"".join(_read(*places[p.key], p.size) for p in pieces)
        moves = [(s, r, sum(p.size for p in pieces)) for (s, r), pieces in sorted(plan.items()) if s != r]
        received = {self._index: read(plan.get((self._index, self._index), []))}
        while moves:
            now, busy = [], (set(), set())
            for move in moves:
                if move[0] not in busy[0] and move[1] not in busy[1]:
                    now.append(move)
                    busy[0].add(move[0]), busy[1].add(move[1])
            payload = {r: read(plan[s, r]) for s, r, _ in now if s == self._index}
            received |= self._layout.send(now, payload, self._index)
            moves = [move for move in moves if move not in now]
        about = next((files.read_json(found.path / _ABOUT)["host"] for found in here.values()), None)
        hosts = (json.loads(text) for text in self._processes.gather(json.dumps(about)))
        return self._split(received, plan), Host(**next(filter(None, hosts)))

    def _split(self, received: dict[int, bytes], plan: dict[tuple[int, int], list[Piece]]) -> dict[Any, np.ndarray]:
        dtypes = [x.dtype for x in jax.tree.leaves(self._layout.like)]
        content = {}
        for sender, data in received.items():
            at = 0
            for piece in plan.get((sender, self._index), []):
                part = np.frombuffer(data, np.uint8, piece.size, at)
                content[piece.key] = part.view(dtypes[piece.leaf]).reshape(piece.shape)
                at += piece.size
        return content

    def _listed(self) -> list[_Found]:
        """Complete checkpoints of this run on this disk, whichever process wrote them."""
        listed = []
        for path in self._place.glob("process*/*"):
            writer = path.parent.name.removeprefix("process")
            if writer.isdecimal() and int(writer) < self._processes.count and re.fullmatch("[0-9]{1,18}", path.name):
                listed.append(_Found(int(path.name), "", int(writer), path))
        return listed

    def _remove_unless(self, wanted: Callable[[_Found], bool]) -> None:
        for found in self._listed():
            if not wanted(found):
                gone = found.path.with_name(f"{found.step}.removed")
                with contextlib.suppress(FileNotFoundError):  # by another process of this host
                    found.path.rename(gone)
                _remove(gone)


def newest_of_both(
    checkpoints: Checkpoints, local: LocalCheckpoints | None, like: TrainState, tell: Callable[[str], None]
) -> tuple[int, TrainState, Host] | None:
    """Step, state and what lives on the host of the newest checkpoint of the workdir and the hosts' disks; or None."""
    least = max(checkpoints.steps(), default=0)
    found = local.newest(least, tell) if local is not None else None
    if found is None and (restored := checkpoints.newest(tell, lambda step: checkpoints.restore(step, like))):
        step, (state, host) = restored
        # Where the workdir's newest were damaged a local one may be newer than what was left.
        older = local.newest(step + 1, tell) if local is not None and step < least else None
        found = older or (step, state, host)
    if local is not None:
        local.resumed(found[0] if found else 0)
    return found


def _run_id(path: pathlib.Path, processes: Processes) -> str:
    """A name for the run in this workdir, which another run there later does not have; asked of the first process."""
    if not processes.first:
        return ""
    place = path / "run.json"
    with contextlib.suppress(FileNotFoundError, KeyError):
        return str(files.read_json(place)["id"])
    made = secrets.token_hex(8)
    metadata.write_json(place, {"id": made})
    if (remote := storage.mirrored(path)) is not None:  # before anything is saved under it
        remote.push()
    return made


def _read(path: pathlib.Path, at: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(size)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
