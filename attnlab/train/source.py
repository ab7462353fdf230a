"""Another run that this one reads: at which checkpoint, of what config, and what its content is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

from attnlab import config as config_lib
from attnlab import storage
from attnlab.errors import ConfigError, UserError
from attnlab.train import digests, metadata, workdir
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.config import RunConfig
from attnlab.train.processes import Processes
from attnlab.train.state import Model


@dataclasses.dataclass(frozen=True)
class Source:
    """Another run, at one of its checkpoints.

    Attributes:
      place: its workdir, as it was found.
      path: where that can be read.
      step: of the checkpoint.
      host: what the checkpoint holds besides arrays.
      config: of the run.
      model: taken apart.
    """

    place: str
    path: pathlib.Path
    checkpoints: Checkpoints
    step: int
    host: Host
    config: RunConfig
    model: Model

    def digest(self) -> str:
        """SHA-256 of what the checkpoint's files are, by their names, sizes and own digests."""
        listed = sorted(digests.read(self.checkpoints.directory / str(self.step)).items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A checkpoint of another run, which must be the one that it was: its `Source.digest`."""

    place: pathlib.Path | storage.Url
    step: int
    digest: str


@contextlib.contextmanager
def opened(
    place: pathlib.Path | storage.Url | Pinned,
    processes: Processes | None,
    say: Callable[[str], None],
    *,
    key: str = "init_from",
    step: int | None = None,
) -> Iterator[Source]:
    """The run in a workdir, local or in a bucket, at a checkpoint whose files are all there.

    Args:
      place: the workdir; with a step and a digest of its own, that checkpoint.
      processes: those of the run that reads, which all call this; None: there is one.
      say: is told of damaged checkpoints that are stepped over.
      key: what named the workdir, for messages.
      step: of the checkpoint; None: the newest.

    Raises:
      UserError: there is none, it is another one than was pinned, or this version of attnlab cannot read its config.
    """
    pinned = place if isinstance(place, Pinned) else None
    place, step = (place, step) if pinned is None else (pinned.place, pinned.step)
    with storage.opened(place) as path:
        name = place_name(place)
        if metadata.read_config(path) is None:
            raise UserError(
                f"{key} = {name} holds no run (no config.json); allowed: the workdir of a run, trained or imported"
            )
        checkpoints = Checkpoints(path, processes=processes)
        there = checkpoints.agreed_steps()
        if step is not None and step not in there:
            shown = ", ".join(map(str, there)) or "it has none"
            raise UserError(f"{key} = {name} has no checkpoint of step {step}; allowed: {shown}")
        free = lambda: workdir.held_if_free(path)
        wanted = there[::-1] if step is None else [step]
        found = checkpoints.first_whole(wanted, checkpoints.agreed_host, say, may_move=free)
        if found is None:
            raise UserError(
                f"{key} = {name} has no checkpoint yet; allowed: a run that has reached its first train.save_every"
            )
        try:
            config = config_lib.build(RunConfig, found[1].config)
        except ConfigError as error:
            raise UserError(f"{key} = {name} is of another version of attnlab: {error}") from None
        source = Source(name, path, checkpoints, *found, config, Model.of(config.model))
        if pinned is not None and source.digest() != pinned.digest:
            raise UserError(
                f"{key} = {name}: its checkpoint of step {step} has the digest {source.digest()[:12]}, and had "
                f"{pinned.digest[:12]} when it was announced; restore that one"
            )
        yield source


def place_name(place: pathlib.Path | storage.Url | Pinned) -> str:
    """A workdir by the one name that it has from everywhere."""
    place = place.place if isinstance(place, Pinned) else place
    return str(place) if isinstance(place, storage.Url) else str(place.absolute())
