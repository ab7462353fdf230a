"""The teacher of a run that is distilled: which one it is, whether it fits, and its parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from attnlab import data as data_lib
from attnlab import paths, storage
from attnlab.errors import ConfigError, Damaged, UserError
from attnlab.models.distillation import Matching
from attnlab.train import files, metadata, optimizers
from attnlab.train import source as source_lib
from attnlab.train.config import RunConfig
from attnlab.train.processes import Processes
from attnlab.train.source import Source
from attnlab.train.state import Model, flat
from attnlab.train.teaching import Teaching

RECORD = "distill.json"
_KEY = "train.distill.teacher"
_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher of a run.

    Attributes:
      source: its run, at the checkpoint that is taken.
      digest: of that checkpoint.
      teaching: what the train step knows of it.
    """

    source: Source
    digest: str
    teaching: Teaching

    @property
    def matching(self) -> Matching:
        """What of it is matched."""
        return self.teaching.matching

    def record(self) -> dict[str, Any]:
        """What is written into the student's workdir."""
        return {"teacher": self.source.place, "step": self.source.step, "digest": self.digest}

    def line(self) -> str:
        """The same, for people, and what is matched."""
        m = self.matching
        what = f"layers {', '.join(map(str, m.layers or ()))}, of each what its {m.at} adds"
        if m.match == "logits":
            mixed = f", and {m.cross_entropy:g} of cross-entropy" if m.cross_entropy else ""
            what = f"logits at temperature {m.temperature:g}{mixed}"
        return f"learns of {self.source.place} at step {self.source.step}: {what}"

    def drawn(self) -> str:
        """For people, what a run that begins as no other one keeps as it was drawn; empty: nothing."""
        if self.matching.match == "logits":
            return ""
        return (
            "train.distill.match = 'layers' without init_from: all but the matched layers learns nothing and keeps its "
            "own first values; with init_from = the teacher's workdir those are the teacher's"
        )

    def params(self, mesh: Mesh) -> Any:
        """Its parameters, a pure dict, split over a mesh.

        Raises:
          UserError: the checkpoint is damaged.
        """
        like = self.teaching.params(mesh)
        try:
            return self.source.checkpoints.restore_params(self.source.step, like)[0]
        except Damaged as error:
            raise UserError(
                f"{_KEY} = {self.source.place}: checkpoint {self.source.step} cannot be read: {error}"
            ) from None

    def require_fit(self, config: RunConfig, model: Model, data: data_lib.Data) -> None:
        """Raises UserError unless the run can learn of it: length, tokens, and what its optimizer would move.

        Args:
          config: of the run.
          model: the student.
          data: of the run, opened.
        """
        theirs, place = self.source.config, self.source.place
        if config.data.length > theirs.data.length:
            raise ConfigError(
                f"data.length = {config.data.length} is not possible; allowed: {theirs.data.length} or less, the rows "
                f"that {_KEY} = {place} was trained on"
            )
        ours = data.vocabulary_fingerprint()
        known = self.source.host.data.get("tokenizer")
        if ours != known:
            shown = lambda config, mark: f"{getattr(config.data, 'tokenizer', 'none')!r} (fingerprint {str(mark)[:12]})"
            raise UserError(
                f"data.tokenizer = {shown(config, ours)} is not that of {_KEY} = {place}, {shown(theirs, known)}; "
                "allowed: the teacher's, whose ids its parameters stand for"
            )
        _require_frozen(config, model, self.matching)


def _require_frozen(config: RunConfig, model: Model, matching: Matching) -> None:
    """Raises UserError where weight decay would move what learns nothing of the teacher, be it a layer of an array."""
    if not config.optimizer.weight_decay:
        return
    moved = flat(optimizers.factors(config.optimizer, model.usages)) if config.optimizer.rates else {}
    entries = model.entries
    idle = [
        leaf
        for leaf, usage in flat(model.usages).items()
        if usage.role.decayed and moved.get(leaf, 1) and not all(matching.learns(e.name) for e in entries[leaf])
    ]
    if idle:
        more = f"; and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
        raise UserError(
            f"train.distill.match = {matching.match!r} gives no gradient to all of {', '.join(idle[:_SHOWN])}{more}, "
            f"which optimizer.weight_decay = {config.optimizer.weight_decay:g} would shrink\nallowed: optimizer.rates "
            "that freeze them, e.g. '*=0' before 'PATTERN=1' for what learns, or no decay"
        )


@contextlib.contextmanager
def opened(
    config: RunConfig,
    workdir: pathlib.Path,
    processes: Processes | None,
    say: Callable[[str], None],
    *,
    before: dict[str, Any] | None = None,
) -> Iterator[Teacher]:
    """The teacher that a run's config names: the one that it began with, where it has begun.

    Args:
      config: of the run.
      workdir: of the run.
      processes: those of the run, which all call this; None: there is one.
      say: is told of damaged checkpoints that are stepped over.
      before: the config, as a tree, under which what the run goes on from was saved; None: it begins.

    Raises:
      UserError: there is none, it is another one than the run began with or none says which that was, or the student's
        model does not fit it.
    """
    wanted, text = config.train.distill, config.train.distill.teacher
    place = storage.Url(text) if storage.is_url(text) else pathlib.Path(paths.expand(text))
    known = _known(workdir)
    _require_step(workdir, wanted.step, known, before)
    step = wanted.step if known is None else known["step"]
    with source_lib.opened(place, processes, say, key=_KEY, step=step) as source:
        digest = source.digest()
        if known is not None and known["digest"] != digest:
            raise UserError(
                f"workdir {workdir} holds a run that learns of {known['teacher']} at step {known['step']} (digest "
                f"{known['digest'][:12]}); {_KEY} = {source.place} has another checkpoint of that step (digest "
                f"{digest[:12]}); allowed: the same teacher, wherever it lies, or another workdir"
            )
        try:
            matching = wanted.resolved(config.model, source.config.model)
        except ConfigError as error:
            raise ConfigError(f"{error} ({_KEY} = {source.place})") from None
        yield Teacher(source, digest, Teaching(source.model, matching))


def _require_step(
    workdir: pathlib.Path, wanted: int | None, known: dict[str, Any] | None, before: dict[str, Any] | None
) -> None:
    """Raises UserError where another checkpoint is asked for than the run learns of, or nothing says which that is."""
    if known is not None:
        if wanted is not None and wanted != known["step"]:
            raise UserError(
                f"train.distill.step = {wanted} is not possible: workdir {workdir} holds a run that learns of "
                f"{known['teacher']} at step {known['step']}; allowed: {known['step']}, none, or another workdir"
            )
        return
    taught = ((before or {}).get("train") or {}).get("distill")
    if taught and wanted is None:
        raise UserError(
            f"workdir {workdir} holds a run that learns of {taught.get('teacher')}, and {RECORD}, which says at which "
            "step, is lost; allowed: that file restored, train.distill.step = the step that its log.txt says, or "
            "another workdir"
        )


def _known(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the workdir has of its teacher; None: nothing."""
    try:
        found = files.read_json(workdir / RECORD)
        return {"teacher": str(found["teacher"]), "step": int(found["step"]), "digest": str(found["digest"])}
    except FileNotFoundError:
        return None
    except (Damaged, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{workdir / RECORD} is damaged ({error}); restore it or use another workdir") from None


def write(workdir: pathlib.Path, teacher: Teacher) -> None:
    """Writes which teacher a run has."""
    metadata.write_json(workdir / RECORD, teacher.record())


def note(values: dict[str, float]) -> str:
    """Of a step's metrics what the progress line says of the parts: both of the logits', the worst of the layers'."""
    parts = {name.removeprefix("distill_"): value for name, value in values.items() if name.startswith("distill_")}
    layers = {name: value for name, value in parts.items() if name.startswith("layer_")}
    if layers:
        worst = max(layers, key=lambda name: layers[name])
        return f"worst {worst.replace('_', ' ')}: {layers[worst]:.4f}"
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in parts.items())
