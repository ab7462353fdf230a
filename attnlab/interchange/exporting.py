"""A workdir's model as a folder that transformers reads: config.json, safetensors, the tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnlab import config as config_lib
from attnlab import mixers, models
from attnlab.data.tokenizers import load_tokenizer
from attnlab.errors import ConfigError, UserError
from attnlab.interchange import tokens
from attnlab.interchange.families import families
from attnlab.interchange.families.base import HOW, Family
from attnlab.interchange.importing import RECORD, Progress
from attnlab.interchange.pieces import Table
from attnlab.interchange.safetensors import DTYPES, NAMES, Made, write
from attnlab.train import files, metadata, restore
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.config import RunConfig
from attnlab.train.program import Program
from attnlab.train.state import flat

log = logging.getLogger(__name__)

_SHOWN = 6
_VERSION = "4.57.0"  # of transformers, whose keys are written


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      family: of the folder.
      notes: what whoever reads it must know.
    """

    folder: pathlib.Path
    family: Family
    step: int
    dtype: str
    tensors: int
    bytes: int
    notes: list[str]


def run(
    path: pathlib.Path, to: pathlib.Path, *, checkpoint: str = "best", dtype: str | None = None,
    largest: int = 5 * 10**9, remote_code: bool = False, overrides: Sequence[str] = (), ema: bool = False,
    say: Callable[[str], None],
) -> Exported:  # fmt: skip
    """Writes the folder `to`, which is there only once it is whole.

    Args:
      path: workdir.
      checkpoint: best, latest or a step.
      dtype: of `NAMES`; None: what the model was imported in, else float32.
      largest: bytes of a file of tensors.
      remote_code: whether the folder may have code of its own, where transformers has no such architecture.
      overrides: of the run's config: where it is restored to.
      ema: whether the averaged weights of `train.ema` take the place of the parameters.

    Raises:
      UserError: no published family has this model, and why; what `restore` raises; the folder is there.
    """
    if to.exists():
        raise UserError(f"--to {to} is there; name a new folder")
    step, config, params, notes = _restored(path, checkpoint, list(overrides), ema)
    record = _imported(path)
    untouched = record is not None and step == 0 and (path / "tokenizer" / "tokenizer.json").is_file()
    done = write_model(
        to, config, params, step=step, dtype=dtype or (record or {}).get("dtype") or "float32", largest=largest,
        first=(record or {}).get("family"), remote_code=remote_code, say=say,
        came=(path / "tokenizer", record["config"]) if untouched else None,
    )  # fmt: skip
    return dataclasses.replace(done, notes=notes + done.notes)


def write_model(
    to: pathlib.Path, config: RunConfig, params: Any, *, step: int = 0, dtype: str = "float32",
    largest: int = 5 * 10**9, first: str | None = None, remote_code: bool = False,
    came: tuple[pathlib.Path, Mapping[str, Any]] | None = None, say: Callable[[str], None],
) -> Exported:  # fmt: skip
    """As `run`, of parameters that are here.

    Args:
      params: the model's, a pure dict.
      step: where they are from.
      first: the family to try before the others.
      came: the tokenizer's folder and the config.json of an import that was not trained; None: the tokenizer is the
        config's.

    Raises:
      UserError: no published family has this model, and why.
    """
    family, tree = choose(config, first, remote_code=remote_code)
    new = to.with_name(to.name + ".new")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    try:
        table = Table(list(family.pieces(config.model)))
        leaves = flat(params)
        table.require_whole({name: leaf.shape for name, leaf in leaves.items()})
        made = [_made(name, pieces, leaves, NAMES[dtype]) for name, pieces in table.parts().items()]
        progress = Progress(sum(tensor.bytes for tensor in made), say, "wrote")
        write(new, made, largest, progress.add)
        progress.done()
        for name, text in family.code(config.model).items():
            (new / name).write_text(text, encoding="utf-8")
        _write_rest(new, tree, config, dtype, came)
        new.rename(to)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    notes = _notes(family, config, came is not None)
    return Exported(to, family, step, dtype, len(made), sum(t.bytes for t in made), notes)


def _notes(family: Family, config: RunConfig, untouched: bool) -> list[str]:
    notes = [f"the code that reads it is that of {family.own_code}"] if family.own_code else []
    if family.remote_code:
        notes.append(
            "the folder has its own code: load it with trust_remote_code=True; no cache, so generating is slow"
        )
    if getattr(config.data, "tokenizer", None) is None:
        notes.append(f"data.name = {config.data.node_name!r} has no tokenizer, so there is none in the folder")
    elif not untouched:
        notes.append("texts begin with the token that ends them, as in training: its tokenizer puts it in front")
    return notes


def _restored(path: pathlib.Path, which: str, overrides: list[str], ema: bool) -> tuple[int, RunConfig, Any, list[str]]:
    """Step, config and parameters of a checkpoint, and what to know of these; its data is not opened."""
    if metadata.read_config(path) is None:
        raise UserError(f"workdir {path} holds no run (no config.json)")
    checkpoints = Checkpoints(path)
    steps = checkpoints.steps()
    if which not in ("best", "latest") and which not in map(str, steps):
        raise UserError(f"checkpoint {which!r} is not there; allowed: best, latest, {', '.join(map(str, steps))}")
    order = {"best": checkpoints.best_first, "latest": lambda: steps[::-1]}.get(which, lambda: [int(which)])()

    def read(step: int) -> tuple[RunConfig, Any, list[str]]:
        host = checkpoints.host(step)
        group, notes = restore.weights(path, step, host, ema)
        config = config_lib.build(RunConfig, config_lib.apply_overrides(host.config, overrides))
        like = Program.of(config, batches=False).params
        return config, checkpoints.restore_params(step, like, group=group)[0], notes

    found = checkpoints.first_whole(order, read, log.warning, may_move=lambda: contextlib.nullcontext(False))
    if found is None:
        raise UserError(f"workdir {path} has no checkpoint yet")
    step, (config, params, notes) = found
    if config.model.node_name != "lm":
        raise UserError(f"workdir {path} holds a model of kind {config.model.node_name!r}; allowed: a language model")
    return step, config, params, notes


def _imported(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return files.read_json(path / RECORD)
    except FileNotFoundError:
        return None


def choose(config: RunConfig, first: str | None = None, *, remote_code: bool = False) -> tuple[Family, dict[str, Any]]:
    """A family that has exactly this model, and its config.json.

    Args:
      first: the family to try before the others.
      remote_code: whether, where transformers itself has none, the folder may have code of its own.

    Raises:
      UserError: none has; the one that comes nearest, and what it has not.
    """
    wanted, nearest = canonical(config.model), None
    known = [f for f in families() if not (f.own_code if remote_code else f.remote_code)]
    for family in sorted(known, key=lambda family: (family.remote_code, family.name != first)):
        try:
            tree = family.write(config.model, config.data.length)
            again = canonical(models.config_from_node(family.read(_plain(tree), family.name), "model"))
        except (UserError, ConfigError) as error:
            if family.remote_code:
                raise
            reasons, far = [str(error).splitlines()[0]], True  # it has no words for it
        else:
            far = False
            reasons = [f"{key} = {a}" for key, a, b in config_lib.difference(wanted, again) if not _equal(a, b)]
            if not reasons:
                return family, tree
        if nearest is None or (far, len(reasons)) < nearest[0]:
            nearest = (far, len(reasons)), family.name, reasons
    _, name, reasons = nearest
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise UserError(
        f"no published family that is known has this model; the nearest, {name}, has not: "
        f"{'; '.join(reasons[:_SHOWN])}{more}; remote code may hold it"
    )


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(tree))


def _equal(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-12) if numbers else a == b


def canonical(model: Any) -> dict[str, Any]:
    """What a model's config says of its function, layer by layer, defaults filled in: equal where two are one model."""
    tree = {k: v for k, v in config_lib.to_dict(model).items() if k not in HOW | {"mixers", "pattern"}}
    tree["mlp_width"] = model.hidden
    layers = {}
    for layer in range(model.layers):
        for i, letter in enumerate(model.blocks[layer % len(model.blocks)]):
            layers[f"{layer}+{i}" if i else f"{layer}"] = _canonical_mixer(model.mixers[letter], model.width)
    return tree | {"layers": layers}


def _canonical_mixer(mixer: Any, width: int) -> dict[str, Any]:
    tree = {k: v for k, v in config_lib.to_dict(mixer).items() if k not in HOW}
    parts = {k: getattr(mixer, k) for k in tree if isinstance(getattr(mixer, k, None), mixers.MixerConfig)}
    tree |= {k: _canonical_mixer(part, width) for k, part in parts.items()}
    head = getattr(mixer, "head_dim", lambda width: None)(width)
    if "head_width" in tree:
        tree["head_width"] = head
    if "kv_heads" in tree:
        tree["kv_heads"] = mixer.key_heads
    if "key_heads" in tree and tree["key_heads"] is None:
        tree["key_heads"] = mixer.heads
    if tree.get("rope_width") is None and "rope_width" in tree:
        tree["rope_width"] = head
    if tree.get("qk_norm") is True and tree["qk_epsilon"] is None:
        tree["qk_epsilon"] = 1e-6
    if "query_scale" in tree and tree["query_scale"] is None:
        tree["query_scale"] = head**-0.5
    return tree


def _made(name: str, pieces: list[Any], leaves: Mapping[str, jax.Array], dtype: str) -> Made:
    def make() -> np.ndarray:
        array = np.empty(pieces[0].shape, DTYPES[dtype])
        for piece in pieces:
            leaf = leaves[piece.leaf]
            piece.write(jax.device_get(leaf if piece.repeat is None else leaf[piece.repeat]), array)
        if dtype == "F16" and not np.isfinite(array).all():
            raise UserError(f"--dtype float16: {name} has numbers that it does not hold; allowed: float32, bfloat16")
        return array

    return Made(name, dtype, pieces[0].shape, make)


def _write_rest(folder: pathlib.Path, tree: dict[str, Any], config: RunConfig, dtype: str, source: Any) -> None:
    """config.json, generation_config.json and the tokenizer; of an import that was not trained, as these came."""
    spec, ids = getattr(config.data, "tokenizer", None), {}
    if source is None and spec is not None:
        tokenizer = load_tokenizer(spec)
        ids = tokens.special_ids(tokenizer)
        tokens.write(spec, tokenizer, folder, config.data.length)
    elif source is not None:
        place, old = source
        tokens.copy(place, folder)
        ids = {key: old[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in old}
        tree = {**tree, "max_position_embeddings": old.get("max_position_embeddings", tree["max_position_embeddings"])}
    tree = {**tree, **ids, "torch_dtype": dtype, "dtype": dtype, "transformers_version": _VERSION}
    metadata.write_json(folder / "config.json", tree)
    if not (folder / "generation_config.json").is_file():
        metadata.write_json(folder / "generation_config.json", {**ids, "transformers_version": _VERSION})
