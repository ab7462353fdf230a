"""Models of attnlab's own: config.json holds the stack and its mixers' knobs, the folder the PyTorch code of them.

A mixer's code is the file of its name in `attnlab.interchange.remote`, whose docstring says what it is to state.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import UserError
from attnlab.interchange.families.base import HOW, Family
from attnlab.interchange.pieces import Piece
from attnlab.train.state import Model, flat

_PACKAGE = "attnlab.interchange.remote"
_FOLDER = pathlib.Path(__file__).parents[1] / "remote"
_MODEL, _CONFIG, _TABLE = "modeling_attnlab", "configuration_attnlab", "mixers"
_IMPORT = re.compile(rf"^from {re.escape(_PACKAGE)}\.(\w+) import", re.MULTILINE)
_STACK = "transformer.periods.blocks."


@dataclasses.dataclass(frozen=True)
class Form:
    """A file of `attnlab.interchange.remote`.

    Attributes:
      text: its code.
      reads, ignored: knobs that it computes, and those that change speed or training alone, its imports' included.
      imports: names of the files that it imports.
    """

    text: str
    reads: frozenset[str]
    ignored: frozenset[str]
    imports: tuple[str, ...]


@functools.cache
def form(name: str) -> Form:
    """The file of a name, read and not run."""
    text = (_FOLDER / f"{name}.py").read_text(encoding="utf-8")
    imports = tuple(i for i in _IMPORT.findall(text) if i != _TABLE)
    stated = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("READS", "IGNORED"):
            stated[ast.unparse(node.targets[0])] = frozenset(ast.literal_eval(node.value))
    reads, ignored = (stated.get(key, frozenset()) for key in ("READS", "IGNORED"))
    for other in map(form, imports):
        reads, ignored = reads | other.reads, ignored | other.ignored
    return Form(text, reads, ignored, imports)


def formed() -> list[str]:
    """Names of the mixers that have a form."""
    return [name for name in mixers.names() if (_FOLDER / f"{name}.py").is_file()]


class Attnlab(Family):
    """A language model whose mixers all have a form."""

    name = model_type = "attnlab"
    architecture = "AttnlabForCausalLM"
    remote_code = True

    def read(self, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
        node = tree.get("attnlab")
        if not isinstance(node, Mapping):
            raise UserError(f"{where}: attnlab = {config_lib.show(node)} is not read; allowed: an object")
        return dict(node)

    def write(self, config: Any, length: int) -> dict[str, Any]:
        node = _node(config, form(_MODEL), "model") | {"mlp_width": config.hidden}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "auto_map": {
                "AutoConfig": f"{_CONFIG}.AttnlabConfig",
                "AutoModel": f"{_MODEL}.AttnlabModel",
                "AutoModelForCausalLM": f"{_MODEL}.{self.architecture}",
            },
            "attnlab": node,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "vocab_size": config.vocab,
            "max_position_embeddings": length,
            "tie_word_embeddings": False,  # what is tied is one tensor in its code
            "use_cache": False,
        }

    def code(self, config: Any) -> dict[str, str]:
        names = sorted(set(_names(config.mixers)))
        table = [f"from .{name} import Form as {name}" for name in names]
        entries = "".join(f'    "{name}": {name},\n' for name in names)
        lines = ['"""The mixers of this model, by name."""', "", *table, "", f"FORMS = {{\n{entries}}}"]
        found = {f"{_TABLE}.py": "\n".join(lines) + "\n"}
        left = [_MODEL, *names]
        while left:
            file = form(name := left.pop())
            found[f"{name}.py"] = _IMPORT.sub(r"from .\1 import", file.text)
            left += [other for other in file.imports if f"{other}.py" not in found]
        return found

    def pieces(self, config: Any) -> Iterator[Piece]:
        leaves, blocks = flat(Model.of(config).pure_shapes), len(config.blocks)
        yield Piece("embedding", None, "model.embed_tokens.weight", leaves["embedding"].shape)
        for layer in range(config.layers):
            repeat, block = divmod(layer, blocks)
            here = f"{_STACK}{block}."
            for leaf in leaves:
                if leaf.startswith(here):
                    there = f"model.layers.{layer}.{leaf.removeprefix(here)}"
                    yield _piece(leaf, repeat, there, leaves[leaf].shape[1:])
        if "norm.scale" in leaves:
            yield _piece("norm.scale", None, "model.norm.scale", leaves["norm.scale"].shape)
        if "head.kernel" in leaves:
            yield _piece("head.kernel", None, "lm_head.kernel", leaves["head.kernel"].shape)


def _piece(leaf: str, repeat: int | None, tensor: str, shape: tuple[int, ...]) -> Piece:
    """As PyTorch has it: the kernel of a projection is `weight`, [out, in]."""
    if leaf.endswith(".kernel"):
        return Piece(leaf, repeat, f"{tensor.removesuffix('kernel')}weight", shape[::-1], "transposed")
    return Piece(leaf, repeat, tensor, shape)


def _node(config: Any, read: Form, where: str) -> dict[str, Any]:
    """A config's fields without how it is computed.

    Raises:
      UserError: a mixer has no form; a field that its form does not read is not at its default.
    """
    node = {"name": config.node_name}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in HOW & read.ignored:
            continue
        if field.name not in read.reads | read.ignored:
            if value != field.default:
                raise UserError(
                    f"{where}.{field.name} = {config_lib.show(config_lib.to_dict(value))}: the PyTorch code of "
                    f"{config.node_name} has only {config_lib.show(field.default)}"
                )
        elif field.name == "mixers":
            node["mixers"] = {k: _mixer(v, f"{where}.mixers.{k}") for k, v in value.items()}
        elif isinstance(value, mixers.MixerConfig):
            node[field.name] = _mixer(value, f"{where}.{field.name}")
        else:
            node[field.name] = config_lib.to_dict(value)
    return node


def _mixer(config: Any, where: str) -> dict[str, Any]:
    if config.node_name not in (known := formed()):
        raise UserError(
            f"{where} is {config.node_name}, which has no PyTorch code yet; those that have: {', '.join(known)}"
        )
    return _node(config, form(config.node_name), where)


def _names(configs: Mapping[str, Any]) -> Iterator[str]:
    """Of mixers, those that are part of others included."""
    for config in configs.values():
        yield config.node_name
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        yield from _names({k: v for k, v in values.items() if isinstance(v, mixers.MixerConfig)})
