"""First values of a model's parameters: each is drawn with a key of its own, made of the seed and the parameter's name.

So a model that differs from another in one layer has all its other values in common with it, bit for bit: neither what
was drawn before nor in which order matters. Layers are counted through the stack, whatever its pattern repeats, and a
block's MLP has one name whatever stands before it: `pattern=MMMS` shares all but the mixers of every fourth layer with
`pattern=M`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.models.transformer import Transformer

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter of one layer, whatever array holds it.

    Attributes:
      name: by which its first value is drawn; layers are counted through the stack.
      layer: the beginning of `name` that all parameters of the same mixer in the same layer have; empty: of no mixer's.
      mixer: which one that is, by its registered name; empty: of no mixer's.
    """

    name: str
    layer: str = ""
    mixer: str = ""


def entries(model: nnx.Module) -> dict[str, list[Entry]]:
    """Of each parameter's dotted path what its array holds: one, or one for each layer along the first axis."""
    stacks = _stacks(model)
    return {
        ".".join(map(str, path)): _entries(path, stacks) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def by_path(model: nnx.Module, key: jax.Array) -> dict[str, Any]:
    """First values of a model's parameters, a pure dict; what is not drawn is as the model has it.

    Args:
      model: built with any key.
      key: of the seed.
    """
    params = nnx.state(model, nnx.Param)
    values = nnx.to_pure_dict(params)
    stacks = _stacks(model)
    for path, variable in nnx.to_flat_state(params):
        if (draw := variable.get_metadata().get("draw")) is not None:
            names = np.array([zlib.crc32(entry.name.encode()) for entry in _entries(path, stacks)], np.uint32)
            keys = jax.vmap(lambda name: jax.random.fold_in(key, name))(jnp.asarray(names))
            holder = functools.reduce(operator.getitem, path[:-1], values)
            holder[path[-1]] = jax.vmap(draw)(keys).reshape(variable.shape)
    return values


def _stacks(model: nnx.Module) -> dict[Path, Transformer]:
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Transformer)}


def _entries(path: Path, stacks: dict[Path, Transformer]) -> list[Entry]:
    """What a parameter's array is stacked of, layer by layer; one outside of stacks is one."""
    dotted = lambda *parts: ".".join(map(str, parts))
    for start, stack in stacks.items():
        match path[len(start) :] if path[: len(start)] == start else ():
            case ("periods", "blocks", int(block), "sublayers", int(index), *rest):
                blocks = stack.config.blocks
                layers = [dotted(*start, "layers", repeat * len(blocks) + block) for repeat in range(stack.repeats)]
                if index == len(blocks[block]):
                    return [Entry(dotted(layer, "mlp", *rest)) for layer in layers]
                mixer = stack.config.mixers[blocks[block][index]].node_name
                places = [dotted(layer, "mixers", index) for layer in layers]
                return [Entry(dotted(place, *rest), place, mixer) for place in places]
    return [Entry(dotted(*path))]
