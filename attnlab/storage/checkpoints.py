"""Checkpoints in a bucket: `checkpoints/STEP/...`, complete once their `digests.json` is there."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection
from typing import Any

from attnlab.errors import Damaged, UserError
from attnlab.storage.bucket import Bucket, log, patience

BELOW, MARK = "checkpoints", "digests.json"
_UPLOADS = "uploads"


class RemoteCheckpoints:
    """The checkpoints of a workdir in a bucket, and copies of their files in its staging directory.

    Args:
      bucket: of the workdir.
      path: the staging directory.
      term: of the run's lease: what other attempts left is not taken for this one's.
      before_commit: brings all else to the bucket, and raises if this process may not write.
    """

    def __init__(self, bucket: Bucket, path: pathlib.Path, term: int, before_commit: Callable[[], None]):
        self._bucket, self._path, self._term, self._before_commit = bucket, path, term, before_commit
        self._steps: set[int] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        if self._steps is None:  # after that all changes are ours
            found = (re.fullmatch(rf"{BELOW}/(0|[1-9][0-9]{{0,17}})/{MARK}", n) for n in self._bucket.listing(BELOW))
            self._steps = {int(match[1]) for match in found if match}
        return sorted(self._steps)

    def look_again(self) -> None:
        """Another process of the run has moved some."""
        self._steps = None

    def sizes(self, step: int) -> dict[str, int]:
        """Bytes of every object of a checkpoint, by name below it."""
        below = f"{BELOW}/{step}/"
        return {name.removeprefix(below): o.size for name, o in self._bucket.listing(below.rstrip("/")).items()}

    def fetch(self, step: int, only: Collection[str] = ()) -> None:
        """Brings a checkpoint's files here, or some; those that are here are not brought again.

        Raises:
          Damaged: one went away meanwhile.
        """
        below = f"{BELOW}/{step}/"
        objects = self._bucket.listing(below.rstrip("/"))
        wanted = {n: self._path / n for n in objects if not only or n.removeprefix(below) in only}
        wanted = {n: p for n, p in wanted.items() if not p.is_file() or p.stat().st_size != objects[n].size}
        try:
            self._bucket.download(wanted, objects)
        except FileNotFoundError as error:
            raise Damaged(f"{error} is not there any more") from None

    def drop(self, step: int) -> None:
        """Removes what is here of a checkpoint."""
        shutil.rmtree(self._path / BELOW / str(step), ignore_errors=True)

    def commit(
        self, step: int, directory: pathlib.Path, index: int, count: int, write: Callable[[dict[str, Any]], None]
    ) -> None:
        """Writes a checkpoint to the bucket, its `digests.json` last.

        Several processes each have written their part of it into a directory of their own: each brings its files, the
        first those that all have alike. They meet in the bucket: the first says what it brings, the others what they
        do, and only when all is there it writes `digests.json`, of all.

        Args:
          directory: of the local files, with a `digests.json` of them.
          index, count: of this process, and of all.
          write: writes the `digests.json` of these files into the directory.
        """
        local = json.loads((directory / MARK).read_bytes())["files"]
        meeting = f"{_UPLOADS}/{self._term}-{step}"
        bring = dict(local)
        if index:
            first = self._told(f"{meeting}/0.json")
            bring = {name: value for name, value in local.items() if name not in first}
        elif count > 1:
            self._bucket.put(f"{meeting}/0.json", json.dumps(local).encode())
        self._bucket.upload({f"{BELOW}/{step}/{name}": directory / name for name in bring})
        if index:
            self._bucket.put(f"{meeting}/{index}.json", json.dumps(bring).encode())
            return
        for other in range(1, count):
            local |= self._told(f"{meeting}/{other}.json")
        if count > 1:
            write(local)
        self._before_commit()
        self._bucket.upload({f"{BELOW}/{step}/{MARK}": directory / MARK})
        self._bucket.remove(self._bucket.listing(meeting) if count > 1 else ())

    def committed(self, step: int) -> None:
        """A checkpoint is complete, and no process needs its files here any more."""
        self.steps()
        self._steps.add(step)
        self.drop(step)

    def _told(self, name: str) -> dict[str, Any]:
        until = time.monotonic() + 4 * patience()
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError):
                return json.loads(self._bucket.get(name))
            time.sleep(0.5)
        raise UserError(f"{self._bucket.url}/{name} did not come: a process of the run did not write its part")

    def remove(self, step: int) -> Callable[[], None]:
        """Makes a checkpoint no checkpoint any more; what it returns removes its files, and may be called later."""
        self._bucket.remove([f"{BELOW}/{step}/{MARK}"])
        self.steps()
        self._steps.discard(step)

        def rest() -> None:
            try:
                self._bucket.remove(self._bucket.listing(f"{BELOW}/{step}"))
            except UserError as error:
                log.warning("%s; what is left of checkpoint %d goes when the run is started again", error, step)

        return rest

    def remove_incomplete(self) -> None:
        """Removes what attempts left that did not come to write `digests.json`."""
        names = self._bucket.listing(BELOW)
        whole = {f"{BELOW}/{step}/" for step in self.steps()}
        left = [name for name in names if not any(name.startswith(below) for below in whole)]
        self._bucket.remove([*left, *self._bucket.listing(_UPLOADS)])

    def set_aside(self, step: int) -> str:
        """Moves a checkpoint to `damaged_checkpoints`; returns where it is now."""
        taken = {name.split("/")[1] for name in self._bucket.listing("damaged_checkpoints")}
        name = next(n for i in range(10**6) if (n := f"{step}-{i}" if i else str(step)) not in taken)
        files = {n: f"damaged_checkpoints/{name}/{n.split('/', 2)[2]}" for n in self._bucket.listing(f"{BELOW}/{step}")}
        self._bucket.copy(files)
        self.remove(step)()
        self.drop(step)
        return os.path.join(self._path, "damaged_checkpoints", name)
