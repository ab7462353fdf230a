"""The language model of vectors: a linear map in place of the table of embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab.mixers.parts import Linear
from attnlab.mixers.roles import Role
from attnlab.models.cost import ModelCost, stack_cost
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.objective import Batch, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorModelConfig(LanguageModelConfig):
    """A stack between a linear map of vectors and logits over classes (`vocab` of them).

    Attributes:
      inputs: numbers of a position's input.
    """

    inputs: int

    def __post_init__(self) -> None:
        config_lib.require(self.inputs >= 1, "model.inputs", self.inputs, "1 or more")
        for key in ("tied", "decoupled"):
            config_lib.require(not getattr(self, key), f"model.{key}", True, "false where inputs are vectors")
        for key in ("cell_code", "box_code"):
            value = getattr(self, key)
            config_lib.require(value is None, f"model.{key}", value, "none where inputs are vectors")
        super().__post_init__()
        no_text = self.fixed_text is None
        config_lib.require(
            no_text, "model.mixers", "a mixer with a text", "none that reads one, where inputs are vectors"
        )

    @property
    def described(self) -> str:
        return "a causal model of vectors"


@register("vectors")
class VectorModel(LanguageModel):
    """Linear map, transformer, norm, output projection; what comes next is one of `vocab` classes."""

    Config = VectorModelConfig
    decodes = False

    @staticmethod
    def make_embedding(config: VectorModelConfig, rngs: nnx.Rngs) -> Linear:
        dtype = config.compute_dtype
        return Linear(config.inputs, config.width, (None, "embed"), rngs=rngs, dtype=dtype, role=Role.EMBEDDING)

    @classmethod
    def batch_spec(cls, config: VectorModelConfig, length: int) -> Mapping[str, Any]:
        spec = dict(super().batch_spec(config, length))
        del spec["tokens"]
        return {"inputs": batch_lib.Field((length, config.inputs), "float32", ("seq", None))} | spec

    @classmethod
    def cost(cls, config: VectorModelConfig, length: int) -> ModelCost:
        stack = stack_cost(config, length)
        embedding, head = config.inputs * config.width, config.vocab * config.width
        flops = {"mlp": stack.flops["mlp"], "embedding": 2.0 * embedding, "head": 2.0 * head} | stack.flops
        parameters = stack.parameters + embedding + head + config.norm_parameters
        return dataclasses.replace(stack, parameters=parameters, embedding_parameters=embedding, flops=flops)

    def embedded(self, batch: Batch) -> jax.Array:
        return self.embedding(batch["inputs"])
