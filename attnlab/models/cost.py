"""What a model costs: parameters, FLOPs per token, streaming state."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnlab import mixers
from attnlab.models import objective
from attnlab.models.transformer import StackConfig


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Costs of a whole model on sequences of one length.

    Attributes:
      parameters: number of scalars.
      embedding_parameters: those of them in the input embedding; 0 of a stack alone.
      flops: forward FLOPs per token of the matrix products by part, a multiply-add counted as 2 and causal counted as
        causal; a training step costs three times their sum.
      state_bytes: bytes of streaming state per sequence at that length.
    """

    parameters: int
    embedding_parameters: int
    flops: dict[str, float]
    state_bytes: int

    @property
    def total_flops(self) -> float:
        """Forward FLOPs per token, all parts."""
        return sum(self.flops.values())


def model_cost(config: Any, length: int) -> ModelCost:
    """Costs of a model on sequences of `length` positions."""
    return objective.of(config).cost(config, length)


def stack_cost(config: StackConfig, length: int) -> ModelCost:
    """Costs of a model's stack of blocks."""
    repeats, letters = config.layers // len(config.blocks), "".join(config.blocks)
    mlp, has_mlp = 3 * config.width * config.hidden, config.hidden > 0
    norms = (repeats * len(letters) + has_mlp * config.layers) * (2 if config.norm_after else 1)
    biases = config.mlp_bias * (2 * config.hidden + config.width)
    parameters = config.layers * (mlp + biases) + norms * config.norm_parameters
    gated = [letter for block in config.blocks for letter in block if letter in config.gated]
    parameters += repeats * (len(gated) + has_mlp * sum(set(block) <= set(config.gated) for block in config.blocks))
    flops = {"mlp": 2.0 * config.layers * mlp}
    state_bytes = 0
    for letter in letters:
        node = config.mixers[letter]
        cost = mixers.get(node.node_name).cost(node, config.width, length, config.compute_dtype)
        parameters += repeats * cost.parameters
        state_bytes += repeats * cost.state_bytes
        for part, value in cost.flops.items():
            key = f"{node.node_name}.{part}"
            flops[key] = flops.get(key, 0.0) + repeats * value
    return ModelCost(parameters, 0, flops, state_bytes)
