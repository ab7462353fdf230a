"""A published checkpoint as a workdir, which every verb takes as one that it has made."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnlab import config as config_lib
from attnlab import memory, models
from attnlab.errors import UserError
from attnlab.interchange import conversions, tokens
from attnlab.interchange.families import family_of
from attnlab.interchange.families.base import Family
from attnlab.interchange.pieces import Table, read_leaf
from attnlab.interchange.safetensors import DTYPES, NAMES, Folder
from attnlab.train import files, metadata, workdir
from attnlab.train.checkpoints import Checkpoints, Host
from attnlab.train.config import RunConfig
from attnlab.train.hardware import require_memory
from attnlab.train.processes import Processes
from attnlab.train.program import Program, open_data
from attnlab.train.state import Model, flat

log = logging.getLogger(__name__)

RECORD = "imported.json"
_LONGEST = 4096  # positions of a row, where a model can read more
_SHOWN = 10
# Tensors that are no part of the text model, or are made from its config.
_SKIPPED = re.compile(
    r"(.*\.rotary_emb\.inv_freq|mtp\..*|(model\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector)\..*)"
)
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an import does.

    Attributes:
      source: the folder.
      tree: its config.json.
      config: of the run.
      own: the model as the checkpoint has it, before `--as`.
      table: from its tensors to the run's parameters.
      names: of the table's tensors in the folder.
      skipped: tensors that are left out.
      as_: what the layers became.
      notes: what whoever uses the model must know.
    """

    source: pathlib.Path
    tree: Mapping[str, Any]
    family: Family
    config: RunConfig
    own: Any
    table: Table
    folder: Folder
    names: Mapping[str, str]
    skipped: list[str]
    as_: str | None
    notes: list[str]

    @property
    def bytes(self) -> int:
        """Of the tensors that are read."""
        return sum(t.end - t.begin for t in (self.folder.tensors[self.names[name]] for name in self.table.shapes))

    def rows(self) -> list[list[str]]:
        """For a table: each tensor, and what it becomes."""
        found = []
        for name, pieces in self.table.parts().items():
            tensor = self.folder.tensors[self.names[name]]
            becomes = ", ".join(p.leaf + ("" if p.repeat is None else f"[{p.repeat}]") for p in pieces)
            found.append([tensor.name, str(list(tensor.shape)), tensor.dtype, becomes])
        return found


def plan(source: pathlib.Path, to: pathlib.Path | None, as_: str | None = None, overrides: Sequence[str] = ()) -> Plan:
    """Reads config.json and the headers alone, and checks all that they can tell.

    Args:
      source: the folder.
      to: the workdir that it becomes; None: none.
      as_: of `conversions.CONVERSIONS`.
      overrides: `any.field=value` of the run's config.

    Raises:
      UserError: a family, key, value or tensor that is not known, or missing, by name; a damaged file.
    """
    where = source / "config.json"
    try:
        tree = files.read_json(where)
    except FileNotFoundError:
        raise UserError(f"{source} is no checkpoint: it has no config.json") from None
    family, part = family_of(tree, str(where))
    node, folder = family.read({**_shared(tree), **part}, str(where)), Folder.of(source)
    node["dtype"] = "bfloat16" if _stored(folder) in ("BF16", "F16") else "float32"
    own = models.config_from_node(node, "model")
    if as_ is not None:
        node = conversions.convert(as_, node)
    run_tree = _run_tree(tree, part, node, source, to, overrides)
    config = config_lib.build(RunConfig, config_lib.apply_overrides(run_tree, list(overrides)))
    leaves = {name: leaf.shape for name, leaf in flat(Model.of(config.model).pure_shapes).items()}
    table = Table(list(family.pieces(own)))
    if as_ is not None:
        table = conversions.converted(as_, table, own, leaves)
    table.require_whole(leaves)
    names, skipped = _named(table, folder, own.tied, str(source))
    notes = _notes(tree, skipped)
    return Plan(source, tree, family, config, own, table, folder, names, skipped, as_, notes)


def _shared(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a model of text and images says of its text model outside of that one's own part."""
    return {"tie_word_embeddings": tree["tie_word_embeddings"]} if "tie_word_embeddings" in tree else {}


def _stored(folder: Folder) -> str:
    """The type that most numbers are stored in."""
    sizes: dict[str, int] = {}
    for tensor in folder.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.begin
    return max(sizes, key=sizes.__getitem__, default="F32")


def _run_tree(
    tree: Mapping[str, Any], part: Mapping[str, Any], node: dict[str, Any], source: pathlib.Path,
    to: pathlib.Path | None, overrides: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The run's config, as far as the checkpoint says it; the rest is for overrides."""
    longest = part.get("max_position_embeddings")
    length = min(longest, _LONGEST) if isinstance(longest, int) and longest > 0 else _LONGEST
    data: dict[str, Any] = {"source": "stdlib", "length": length, "batch": 8}
    if not any(override.startswith("data.tokenizer=") for override in overrides):
        path = tokens.require(source)
        eod = tokens.end_of_document(path, {**part, **tree})
        place = path if to is None else pathlib.Path(to).absolute() / "tokenizer" / path.name
        data["tokenizer"] = f"{place}?eod={eod}" if eod else str(place)
    return {
        "data": data,
        "model": node,
        "optimizer": {"name": "adamw", "learning_rate": 2e-5, "schedule": "cosine", "warmup": 0.02},
        "train": {"steps": 1000, "sample_tokens": 0},
    }


def _named(table: Table, folder: Folder, tied: bool, where: str) -> tuple[dict[str, str], list[str]]:
    """The table's names in the folder, and what is skipped there."""
    there = folder.tensors
    ends = "embed_tokens.weight"
    prefixes = [name.removesuffix(ends) for name in there if name.endswith(ends) and not _SKIPPED.fullmatch(name)]
    if len(prefixes) != 1:
        found = ", ".join(sorted(prefixes)[:_SHOWN]) or "there is none"
        raise UserError(f"{where}: one tensor must be named ...{ends}; found: {found}")
    outer = prefixes[0].removesuffix("model.")
    head = next((name for name in (f"{outer}{_HEAD}", _HEAD) if name in there), _HEAD)
    renamed = lambda name: head if name == _HEAD else prefixes[0] + name.removeprefix("model.")
    names = {name: renamed(name) for name in table.shapes}
    missing = sorted(set(names.values()) - there.keys())
    left = sorted(there.keys() - set(names.values()))
    skipped = [name for name in left if _SKIPPED.fullmatch(name) or (tied and name == head)]
    extra = [name for name in left if name not in skipped]
    listed = lambda which: f"{', '.join(which[:_SHOWN])}{f' and {len(which) - _SHOWN} more' * (len(which) > _SHOWN)}"
    if missing or extra:
        parts = [f"{word}: {listed(which)}" for word, which in (("missing", missing), ("not known", extra)) if which]
        raise UserError(f"{where}: its tensors are not those that its config.json says; {'; '.join(parts)}")
    for name, shape in table.shapes.items():
        tensor = there[names[name]]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name!r} is {list(tensor.shape)}, config.json makes it {list(shape)}"
            )
        if tensor.dtype not in DTYPES:
            tensor.mapped()  # says so
    return names, skipped


def _notes(tree: Mapping[str, Any], skipped: list[str]) -> list[str]:
    notes = []
    if skipped:
        notes.append(f"{len(skipped)} tensors are left out: {', '.join(skipped[:3])}{', ...' * (len(skipped) > 3)}")
    bos, eos = tree.get("bos_token_id"), tree.get("eos_token_id")
    if isinstance(bos, int) and bos not in (eos if isinstance(eos, list) else [eos]):
        notes.append(
            f"texts began with token {bos} where it was trained; here documents begin with the one that ends them"
        )
    return notes


def run(plan: Plan, path: pathlib.Path, say: Callable[[str], None] = log.info) -> None:
    """Makes the workdir: config.json, the tokenizer, a checkpoint at step 0, and imported.json, which says from where.

    Raises:
      UserError: the workdir holds a run, or cannot be written; the data cannot be opened; a tied head differs.
    """
    config = plan.config
    processes = Processes(config.cluster)
    try:
        with contextlib.ExitStack() as stack:
            if processes.first:
                stack.enter_context(workdir.hold(path))
                _require_new(path)
                if (plan.source / "tokenizer.json").is_file():
                    tokens.copy(plan.source, path / "tokenizer")
            processes.barrier()
            data, program = open_data(config), Program.of(config)
            require_memory(config, 0, memory.size(program.state))
            loader = data.training(seed=config.seed, rows=program.rows(config.data.batch))
            stack.callback(loader.close)
            host = Host(0, loader.get_state(), config_lib.to_dict(config))
            progress = Progress(plan.bytes, say)
            params = parameters(plan, program, progress.add)
            progress.done()
            state = program.begin(params, config.seed)
            checkpoints = Checkpoints(path, config.train.keep, processes=processes)
            stack.callback(checkpoints.close)
            checkpoints.save(0, state, host)
            checkpoints.wait()
            if processes.first:
                record = _record(plan)
                metadata.write_json(path / RECORD, record)
                described = metadata.describe_run(config, imported_from=record["source"], mesh=dict(program.mesh.shape))
                metadata.write_json(path / "config.json", described)
            processes.barrier()
    except BaseException as error:
        processes.failed(error)
        raise
    finally:
        processes.close()


def _require_new(path: pathlib.Path) -> None:
    if (path / "config.json").exists() or Checkpoints(path).steps():
        raise UserError(f"workdir {path} holds a run already; use another")


def _record(plan: Plan) -> dict[str, Any]:
    """What export, and people, want to know later."""
    return {
        "source": str(plan.source.absolute()),
        "family": plan.family.name,
        "as": plan.as_,
        "dtype": next((name for name, kind in NAMES.items() if kind == _stored(plan.folder)), "float32"),
        "files": plan.folder.files,
        "config": dict(plan.tree),
    }


def parameters(plan: Plan, program: Program, read: Callable[[int], None]) -> Any:
    """The run's parameters from the folder, a pure dict: each process reads the bytes of its own shards.

    Args:
      program: of the plan's config.
      read: told the bytes of what is read, as it is.
    """
    tensors = {name: plan.folder.tensors[there] for name, there in plan.names.items()}
    _warn_of_head(plan, tensors)
    pieces: dict[str, list[Any]] = {}
    for piece in plan.table.pieces:
        pieces.setdefault(piece.leaf, []).append(piece)
    filled = {f.leaf: f for f in plan.table.filled}
    named = flat(program.params)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        leaves = {
            name: read_leaf(leaf, pieces.get(name, []), filled.get(name), tensors, read, threads)
            for name, leaf in named.items()
        }
    return jax.tree.unflatten(jax.tree.structure(program.params), list(leaves.values()))


def _warn_of_head(plan: Plan, tensors: Mapping[str, Any]) -> None:
    """Says so where a head is stored beside a tied embedding, and is another: the config is heeded."""
    stored = next((n for n in plan.skipped if n.endswith(_HEAD)), None)
    if stored is None:
        return
    head, embedding = plan.folder.tensors[stored].mapped(), tensors["model.embed_tokens.weight"].mapped()
    if head.shape != embedding.shape or any(
        not np.array_equal(head[i : i + 4096], embedding[i : i + 4096]) for i in range(0, len(head), 4096)
    ):
        log.warning("%s differs from the embedding, which config.json says it is tied to; it is left out", stored)


class Progress:
    """Says every few seconds how far long work is.

    Args:
      total: bytes.
      say: told a line.
      word: what is done with them.
    """

    def __init__(self, total: int, say: Callable[[str], None], word: str = "read", every: float = 5.0):
        self._total, self._say, self._word, self._every = total, say, word, every
        self._so_far, self._began = 0, time.monotonic()
        self._last = self._began

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._so_far += count
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            left = (now - self._began) * max(self._total - self._so_far, 0) / self._so_far
            self._say(f"{self._word} {_size(self._so_far)} of {_size(self._total)}, {left:,.0f} s to go")

    def done(self) -> None:
        """Says what it came to."""
        self._say(f"{self._word} {_size(self._so_far)} in {time.monotonic() - self._began:,.1f} s")


def _size(count: int) -> str:
    unit, word = next((u for u in ((10**9, "GB"), (10**6, "MB")) if count >= u[0]), (10**3, "kB"))
    return f"{count / unit:,.2f} {word}"
