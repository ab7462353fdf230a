"""A run whose parameters begin as those of another run: which of them become which, and where that is written."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import storage
from attnlab.errors import Damaged, UserError
from attnlab.models.initial import Entry
from attnlab.train import files, sharding, workdir
from attnlab.train.program import Program
from attnlab.train.source import Pinned, Source, place_name
from attnlab.train.state import Model, flat

RECORD = "init_from.json"
_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where an array holds an entry: `index` along its first axis, None: the whole of it; `shape` is the entry's."""

    leaf: str
    index: int | None
    shape: tuple[int, ...]
    entry: Entry


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Which parameters of a run begin as whose.

    Attributes:
      parts: of each array's dotted path what its entries begin as; None: as their own first values.
      kept: the run's parameters that do, by path; of an array of which only some layers do, with their places in it.
      dropped: those of the source that the run's model has no place for, alike.
    """

    source: Source
    parts: dict[str, list[_Part | None]]
    kept: list[str]
    dropped: list[str]

    @property
    def taken(self) -> int:
        """Arrays of the run into which something was taken."""
        return sum(any(parts) for parts in self.parts.values())

    def record(self) -> dict[str, Any]:
        """What is written into the workdir."""
        taken = {
            leaf: sorted({part.leaf for part in parts if part}) for leaf, parts in self.parts.items() if any(parts)
        }
        source = {"source": self.source.place, "step": self.source.step}
        return {**source, "taken": taken, "kept": self.kept, "dropped": self.dropped}

    def lines(self) -> list[str]:
        """The same, for people."""
        said = [f"begins as {self.source.place} at step {self.source.step}: {self.taken} parameters are taken from it"]
        if self.kept:
            said.append(f"keep their own first values: {', '.join(self.kept)}")
        if self.dropped:
            said.append(f"are not taken, their layers being others here: {', '.join(self.dropped)}")
        return said

    def params(self, program: Program, seed: int, say: Callable[[str], None]) -> Any:
        """The run's first parameters, a pure dict, placed as the program has them.

        Raises:
          UserError: no checkpoint of the source is whole.
        """
        wanted = {part.leaf for parts in self.parts.values() for part in parts if part}
        model, checkpoints, last = self.source.model, self.source.checkpoints, self.source.step
        axes, shapes = _only(model.axes, wanted), _only(model.pure_shapes, wanted)
        placed = sharding.parameter_shardings(program.mesh, axes, shapes)
        like = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, placed)
        found = checkpoints.first_whole(
            [step for step in checkpoints.agreed_steps()[::-1] if step <= last],
            lambda step: checkpoints.restore_params(step, like, part=True)[0],
            say,
            may_move=lambda: workdir.held_if_free(self.source.path),
        )
        if found is None:
            raise UserError(f"init_from = {self.source.place}: its checkpoint of step {last} is not there any more")
        make = jax.jit(
            lambda given, seed: self._made(program, flat(given), seed), out_shardings=program.shardings.params
        )
        return make(found[1], seed)

    def _made(self, program: Program, given: dict[str, jax.Array], seed: jax.Array) -> Any:
        first = program.model.init(seed)
        leaves = {leaf: self._leaf(leaf, own, given) for leaf, own in flat(first).items()}
        return jax.tree.unflatten(jax.tree.structure(first), list(leaves.values()))

    def _leaf(self, leaf: str, own: jax.Array, given: dict[str, jax.Array]) -> jax.Array:
        parts = self.parts[leaf]
        source = parts[0].leaf if parts[0] else None
        if (
            source in given
            and given[source].shape == own.shape
            and all(p and p.leaf == source and p.index in (None, i) for i, p in enumerate(parts))
        ):
            return given[source].astype(own.dtype)
        one = lambda part, own: own if part is None else _entry(given[part.leaf], part.index).astype(own.dtype)
        return jnp.stack([one(part, own[i]) for i, part in enumerate(parts)]) if any(parts) else own


def _entry(array: jax.Array, index: int | None) -> jax.Array:
    return array if index is None else array[index]


def _only(tree: Any, wanted: Iterable[str], path: tuple[str, ...] = ()) -> Any:
    """A nested dict without what is not wanted."""
    found = {}
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            found |= {key: below} if (below := _only(value, wanted, here)) else {}
        elif ".".join(here) in wanted:
            found[key] = value
    return found


def fit(source: Source, model: Model) -> Beginning:
    """What of a source becomes what of a model. Layers are counted through the stack, whatever its pattern repeats.

    Parameters of the same name and shape are taken. What only the source has is dropped where the model has another
    mixer in that layer; so is what has another shape there.

    Raises:
      UserError: the source has other parameters that the model has not, or of other shapes.
    """
    theirs, ours = _parts(source.model), _parts(model)
    mixers = {part.entry.layer: part.entry.mixer for part in ours.values()}
    taken, dropped, wrong = {}, [], []
    for name, part in theirs.items():
        here = ours.get(name)
        if here is not None and here.shape == part.shape:
            taken[name] = part
        elif mixers.get(part.entry.layer, part.entry.mixer) != part.entry.mixer:
            dropped.append(part)
        else:
            is_ = "not there" if here is None else str(list(here.shape))
            wrong.append(f"{name} is {list(part.shape)} in it and {is_} in this model")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"init_from = {source.place} does not fit model.*: {'; '.join(wrong[:_SHOWN])}{more}\n"
            "allowed: a model that has all of its parameters, by name and shape; what another mixer in a layer "
            "(model.mixers, model.pattern) has no place for is left out"
        )
    kept = [part for name, part in ours.items() if name not in taken]
    entries = model.entries
    parts = {leaf: [taken.get(entry.name) for entry in entries[leaf]] for leaf in flat(model.pure_shapes)}
    return Beginning(source, parts, _listed(kept, ours.values()), _listed(dropped, theirs.values()))


def _parts(model: Model) -> dict[str, _Part]:
    """All entries of a model's parameters, by name."""
    found = {}
    shapes, entries = flat(model.pure_shapes), model.entries
    for leaf, shape in ((leaf, shapes[leaf].shape) for leaf in shapes):
        stacked = entries[leaf][0].name != leaf
        for i, entry in enumerate(entries[leaf]):
            found[entry.name] = _Part(leaf, i if stacked else None, shape[1:] if stacked else shape, entry)
    return found


def _listed(parts: list[_Part], among: Iterable[_Part]) -> list[str]:
    """Arrays by path; one of which not all entries are meant, with the places of those that are."""
    count: dict[str, int] = {}
    for part in among:
        count[part.leaf] = count.get(part.leaf, 0) + 1
    places: dict[str, list[int | None]] = {}
    for part in parts:
        places.setdefault(part.leaf, []).append(part.index)
    return [leaf if len(at) == count[leaf] else f"{leaf}{at}" for leaf, at in places.items()]


def require_same(path: pathlib.Path, place: pathlib.Path | storage.Url | Pinned | None, *, saved: bool) -> None:
    """Raises UserError where a workdir's run began, or is to begin, otherwise than `place` says.

    Args:
      path: the workdir.
      place: another run's, which it should begin as; None: not said.
      saved: whether there is a checkpoint to go on from, which needs no other run.
    """
    try:
        began = str(files.read_json(path / RECORD)["source"])
    except FileNotFoundError:
        began = None
    except (Damaged, KeyError) as error:
        raise UserError(f"{path / RECORD} is damaged ({error}); restore it or use another workdir") from None
    if place is None:
        if began is not None and not saved:
            raise UserError(
                f"workdir {path} has no checkpoint, and its run was to begin as {began} ({RECORD}); "
                f"allowed: init_from = {began}, or another workdir"
            )
        return
    if saved and began != place_name(place):
        how = "with its own first values" if began is None else f"as {began}"
        raise UserError(
            f"workdir {path} holds a run that began {how}, not as init_from = {place_name(place)}; "
            "allowed: no init_from, which goes on with it, or another workdir"
        )
