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
      notes: what `flops` leaves open, of mixers that do not count what is computed (`Mixer.cost_note`).
      second_flops: forward FLOPs of a second stream (`MixerConfig.second_stream`) per position of a row, once for all
        rows of a batch.
    """

    parameters: int
    embedding_parameters: int
    flops: dict[str, float]
    state_bytes: int
    second_flops: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def total_flops(self) -> float:
        """Forward FLOPs per token, all parts."""
        return sum(self.flops.values())


def model_cost(config: Any, length: int, rows: int = 1) -> ModelCost:
    """Costs of a model on sequences of `length` positions, so many `rows` a batch: they share a second stream."""
    cost = objective.of(config).cost(config, length)
    if not cost.second_flops:
        return cost
    return dataclasses.replace(cost, flops=cost.flops | {"second_stream": cost.second_flops / rows})


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
        if node.second_stream:  # its table of what the stream has for each position
            state_bytes += repeats * length * config.stream_bytes
    said = {letter: mixers.get(node.node_name).cost_note(node) for letter, node in config.mixers.items()}
    notes = tuple(f"model.mixers.{letter}: {note}" for letter, note in said.items() if note)
    second = any(config.mixers[letter].second_stream for letter in letters)
    return ModelCost(parameters, 0, flops, state_bytes, sum(flops.values()) if second else 0.0, notes)
