"""First values of a model's parameters: each is drawn with a key of its own, made of the seed and the parameter's name.

So a model that differs from another in one layer has all its other values in common with it, bit for bit: neither what
was drawn before nor in which order matters. Layers are counted through the stack, whatever its pattern repeats, and a
block's MLP has one name whatever stands before it: `pattern=MMMS` shares all but the mixers of every fourth layer with
`pattern=M`.
"""

from __future__ import annotations

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


def by_path(model: nnx.Module, key: jax.Array) -> dict[str, Any]:
    """First values of a model's parameters, a pure dict; what is not drawn is as the model has it.

    Args:
      model: built with any key.
      key: of the seed.
    """
    params = nnx.state(model, nnx.Param)
    values = nnx.to_pure_dict(params)
    stacks = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Transformer)}
    for path, variable in nnx.to_flat_state(params):
        if (draw := variable.get_metadata().get("draw")) is not None:
            names = np.array([zlib.crc32(name.encode()) for name in _names(path, stacks)], np.uint32)
            keys = jax.vmap(lambda name: jax.random.fold_in(key, name))(jnp.asarray(names))
            holder = functools.reduce(operator.getitem, path[:-1], values)
            holder[path[-1]] = jax.vmap(draw)(keys).reshape(variable.shape)
    return values


def _names(path: Path, stacks: dict[Path, Transformer]) -> list[str]:
    """A parameter's name in each layer that its array is stacked of; one outside of stacks has one."""
    for start, stack in stacks.items():
        match path[len(start) :] if path[: len(start)] == start else ():
            case ("periods", "blocks", int(block), "sublayers", int(index), *rest):
                blocks = stack.config.blocks
                part = ("mlp",) if index == len(blocks[block]) else ("mixers", index)
                layers = (repeat * len(blocks) + block for repeat in range(stack.repeats))
                return [".".join(map(str, (*start, "layers", layer, *part, *rest))) for layer in layers]
    return [".".join(map(str, path))]
