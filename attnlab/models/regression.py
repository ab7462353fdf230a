"""Regression on sequences: vectors in, a vector out at every position, squared error where it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab import mixers
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role
from attnlab.models.cost import ModelCost, stack_cost
from attnlab.models.objective import Batch, Objective, Sums, register
from attnlab.models.transformer import StackConfig, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig(StackConfig):
    """A stack between two linear maps.

    Attributes:
      inputs: numbers of a position's input.
      outputs: numbers of its output.
    """

    inputs: int
    outputs: int = 1

    def __post_init__(self) -> None:
        for key in ("inputs", "outputs"):
            config_lib.require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        super().__post_init__()


@register("regression")
class Regression(Objective):
    """Linear map, transformer, norm, linear map. The first and last maps are not decayed, as an embedding and a head.

    Args:
      config: checked at construction.
      rngs: stream `params`.
    """

    Config = RegressionConfig

    def __init__(self, config: RegressionConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = config.compute_dtype
        self.embedding = Linear(
            config.inputs, config.width, (None, "embed"), rngs=rngs, dtype=dtype, role=Role.EMBEDDING
        )
        self.transformer = Transformer(config, rngs=rngs)
        self.norm = config.make_norm()
        self.head = Linear(config.width, config.outputs, ("embed", None), rngs=rngs, dtype=dtype, role=Role.OUTPUT)

    def __call__(self, inputs_BTi: jax.Array, key: jax.Array | None = None) -> mixers.MixerOutput:
        """Predictions [B, T, outputs], fp32 or wider, as `y`; `key` turns dropout on."""
        seq = mixers.Sequence.whole(*inputs_BTi.shape[:2])
        out = self.transformer(self.embedding(inputs_BTi), seq, key)
        y = self.head(self.norm(out.y)).astype(param_dtype(self.config.compute_dtype))
        return dataclasses.replace(out, y=y)

    @classmethod
    def batch_spec(cls, config: RegressionConfig, length: int) -> batch_lib.Spec:
        return {
            "inputs": batch_lib.Field((length, config.inputs), "float32", ("seq", None)),
            "targets": batch_lib.Field((length, config.outputs), "float32", ("seq", None)),
            "weights": batch_lib.Field((length,), "float32", ("seq",)),
        }

    def loss(self, batch: Batch, key: jax.Array | None, options: Mapping[str, Any]) -> Sums:
        """Squared error, summed over outputs, averaged over positions by their weights."""
        out = self(batch["inputs"], key)
        error_BT = _errors(out.y, batch)
        weight = jnp.sum(batch["weights"]).astype(error_BT.dtype)
        tokens = jnp.full_like(weight, batch["weights"].size)
        return Sums.of({"loss": jnp.sum(error_BT)}, out, weight=weight, tokens=tokens)

    def evaluate(self, batch: Batch, options: Mapping[str, Any]) -> dict[str, jax.Array]:
        """`error` [T] and `weight` [T], by position."""
        error_BT = _errors(self(batch["inputs"]).y, batch)
        return {"error": jnp.sum(error_BT, axis=0), "weight": jnp.sum(batch["weights"], axis=0)}

    @classmethod
    def summarize(cls, sums: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> SquaredError:
        return SquaredError(sums["error"], sums["weight"], facts["seen"], facts["baselines"])

    @classmethod
    def cost(cls, config: RegressionConfig, length: int) -> ModelCost:
        stack = stack_cost(config, length)
        embedding, head = config.inputs * config.width, config.width * config.outputs
        parameters = stack.parameters + embedding + head + config.norm_parameters
        flops = {"mlp": stack.flops["mlp"], "embedding": 2.0 * embedding, "head": 2.0 * head}
        flops |= stack.flops
        return dataclasses.replace(stack, parameters=parameters, embedding_parameters=embedding, flops=flops)


def _errors(y_BTo: jax.Array, batch: Batch) -> jax.Array:
    """Weighted squared errors [B, T]."""
    return batch["weights"] * jnp.sum((y_BTo - batch["targets"]) ** 2, axis=-1)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Squared errors on held-out sequences, beside those of predictors that need no training.

    Attributes:
      error_T: float64 [T], weighted, summed over sequences.
      weight_T: float64 [T].
      seen_T: int [T], examples before each position.
      baselines: by name, as `error_T`.
    """

    error_T: np.ndarray
    weight_T: np.ndarray
    seen_T: np.ndarray
    baselines: dict[str, np.ndarray]

    @property
    def loss(self) -> float:
        """Mean squared error."""
        return self._mean(self.error_T)

    @property
    def gap_closed(self) -> float:
        """How far the error is from the zero predictor's (0) to Bayes' (1); NaN where the data has no such two."""
        if not {"zero", "bayes"} <= self.baselines.keys():
            return float("nan")
        zero, bayes = (self._mean(self.baselines[name]) for name in ("zero", "bayes"))
        return (zero - self.loss) / (zero - bayes) if zero > bayes else float("nan")

    def _mean(self, error_T: np.ndarray) -> float:
        return float(error_T.sum() / max(self.weight_T.sum(), 1))

    def by_seen(self, buckets: int = 8) -> list[dict[str, Any]]:
        """Mean errors over buckets of examples seen whose bounds double: `{first, last, count, loss, NAME..}`."""
        most = int(self.seen_T.max()) + 1
        edges = sorted({0, most, *(max(most >> i, 1) for i in range(1, buckets))})
        rows = []
        for lo, hi in zip(edges, edges[1:]):
            here = (self.seen_T >= lo) & (self.seen_T < hi)
            weight = self.weight_T[here].sum()
            if weight:
                mean = lambda error_T: float(error_T[here].sum() / weight)
                others = {name: mean(error_T) for name, error_T in self.baselines.items()}
                rows.append({"first": lo, "last": hi - 1, "count": int(weight), "loss": mean(self.error_T), **others})
        return rows

    def record(self) -> dict[str, float]:
        others = {f"heldout_{name}_loss": self._mean(error_T) for name, error_T in self.baselines.items()}
        return {"heldout_loss": self.loss, "heldout_gap_closed": self.gap_closed, **others}

    def summary(self) -> dict[str, Any]:
        others = {f"{name}_loss": self._mean(error_T) for name, error_T in self.baselines.items()}
        gap = None if np.isnan(self.gap_closed) else self.gap_closed
        count = int(self.weight_T.sum())
        return {"loss": self.loss, **others, "gap_closed": gap, "count": count, "by_examples": self.by_seen()}

    def line(self) -> str:
        others = ", ".join(f"{name} {self._mean(error_T):.4f}" for name, error_T in self.baselines.items())
        return f"held-out squared error {self.loss:.4f} ({others}) on {int(self.weight_T.sum()):,} predictions"

    def lines(self) -> list[str]:
        known = not np.isnan(self.gap_closed)
        gap = f"; {100 * self.gap_closed:.1f} % of the way from zero to bayes" if known else ""
        return [self.line().removeprefix("held-out ") + gap]

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        names = ["loss", *self.baselines]
        rows = [
            [f"{r['first']} to {r['last']}", f"{r['count']:,}", *(f"{r[name]:.4f}" for name in names)]
            for r in self.by_seen()
        ]
        return "squared error by the number of examples seen", ["examples", "predictions", *names], rows
