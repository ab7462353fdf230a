"""Classes of bags: instances without an order, pooled by attention of several branches (ACMIL)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import FrozenDict

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab import mixers
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role
from attnlab.models import bag_queries
from attnlab.models.cost import ModelCost, stack_cost
from attnlab.models.objective import Batch, Objective, Sums, register
from attnlab.models.scores import Scores, sums_of_scores
from attnlab.models.transformer import StackConfig, Transformer, mixer_table
from attnlab.ops.bag_pooling import likeness, pooled, some_of_the_strongest

_nll = optax.softmax_cross_entropy_with_integer_labels
FORMS = ("gated", "queries")
_OF_A_STACK = (
    "mixers", "pattern", "gated", "mlp_width", "mlp_gate", "mlp_bias", "dropout", "norm", "norm_after", "norm_epsilon",
)  # fmt: skip


def _table(tree: Any, path: str) -> FrozenDict[str, Any]:
    return mixer_table(tree, path) if tree else FrozenDict()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BagConfig(StackConfig):
    """Attention pooling, after a stack where there is one.

    Attributes:
      inputs: numbers of an instance.
      classes: of bags.
      form: gated, attention by a product of two maps of the instances; or queries, of heads of a learned query.
      branches: M, each with an attention and a classifier of its own; one alone has none where the form is gated.
      gate_width: of gated, columns of the two maps whose product makes the logits.
      pool_heads: of queries, heads of each; they divide the width.
      pool_dropout: of queries, rate on what is projected, before its norm.
      mask_top: k, instances with the largest logits of which training hides some; 0: none.
      mask_share: of them, rounded down.
      layers: of a stack before the pooling, whose mixers see all instances; 0: none, as published.
      mixers: as of any stack; none where `layers` is 0.
    """

    causal = False

    inputs: int
    classes: int
    form: str = "gated"
    branches: int = 5
    pool_heads: int = 8
    pool_dropout: float = 0.1
    gate_width: int = 128
    mask_top: int = 10
    mask_share: float = 0.6
    layers: int = 0
    mixers: Any = config_lib.node(_table, default=FrozenDict())

    def __post_init__(self) -> None:
        need = config_lib.require
        for key, least in (
            ("inputs", 1), ("classes", 2), ("branches", 1), ("gate_width", 1), ("mask_top", 0), ("layers", 0),
        ):  # fmt: skip
            need(getattr(self, key) >= least, f"model.{key}", getattr(self, key), f"{least} or more")
        config_lib.require_choice("model.form", self.form, FORMS)
        for key in ("gate_width",) if self.form == "queries" else ("pool_heads", "pool_dropout"):
            usual = type(self).__dataclass_fields__[key].default
            need(getattr(self, key) == usual, f"model.{key}", getattr(self, key), f"{usual} where form is {self.form}")
        need(0 <= self.pool_dropout < 1, "model.pool_dropout", self.pool_dropout, "0 or more, below 1")
        if self.form == "queries":
            fits = self.pool_heads >= 1 and self.width % self.pool_heads == 0
            need(fits, "model.pool_heads", self.pool_heads, f"divisors of model.width ({self.width})")
        need(0 <= self.mask_share < 1, "model.mask_share", self.mask_share, "0 or more, below 1")
        if self.layers:
            return super().__post_init__()
        for key in _OF_A_STACK:
            usual = type(self).__dataclass_fields__[key].default
            need(getattr(self, key) == usual, f"model.{key}", getattr(self, key), f"{usual} where model.layers is 0")
        self._require_numbers()

    @property
    def described(self) -> str:
        return "a model of bags"

    @property
    def draws(self) -> bool:
        return super().draws or self.masks or (self.form == "queries" and self.pool_dropout > 0)

    @property
    def masks(self) -> bool:
        """Whether training hides instances."""
        return int(self.mask_share * self.mask_top) > 0


class Pooling(nnx.Module):
    """`h = ReLU(x W)`, logits `(tanh(h V + b) * sigmoid(h U + c)) w + d` for each branch, and classifiers of what they
    pool: one of each branch, and the bag's, of their mean.

    Args:
      config: of the model.
      inputs: columns of x.
      rngs: stream `params`.
    """

    def __init__(self, config: BagConfig, inputs: int, *, rngs: nnx.Rngs):
        dtype, D = config.compute_dtype, config.width
        wide = param_dtype(dtype)
        self.config = config
        self.features = Linear(inputs, D, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        gate = lambda: Linear(D, config.gate_width, ("mlp", "gates"), rngs=rngs, dtype=dtype, bias=True)
        self.tanh, self.sigmoid = gate(), gate()
        self.logits = Linear(config.gate_width, config.branches, ("gates", None), rngs=rngs, dtype=wide, bias=True)
        classifier = lambda: Linear(
            D, config.classes, ("mlp", None), rngs=rngs, dtype=wide, role=Role.OUTPUT, bias=True
        )
        self.classifiers = nnx.List([classifier() for _ in range(config.branches if config.branches > 1 else 0)])
        self.classifier = classifier()

    def __call__(
        self, x_BND: jax.Array, present_BN: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits of bags [B, classes] and of branches [B, M, classes] (M 0 of one branch), fp32 or wider, and
        attention [B, M, N]; `key` turns masking on."""
        c = self.config
        h = jax.nn.relu(self.features(x_BND))
        logits_BMN = jnp.moveaxis(self.logits(jnp.tanh(self.tanh(h)) * jax.nn.sigmoid(self.sigmoid(h))), -1, 1)
        kept_BMN = jnp.broadcast_to(present_BN[:, None], logits_BMN.shape)
        if key is not None and c.masks:
            kept_BMN &= ~some_of_the_strongest(logits_BMN, present_BN, key, c.mask_top, c.mask_share)
        z_BMD, a_BMN = pooled(logits_BMN, kept_BMN, h)
        bag = self.classifier(jnp.mean(z_BMD, axis=1))
        branches = [classifier(z_BMD[:, m]) for m, classifier in enumerate(self.classifiers)]
        return bag, jnp.stack(branches, axis=1) if branches else jnp.zeros((len(bag), 0, c.classes), bag.dtype), a_BMN


@register("bags")
class Bags(Objective):
    """Attention pooling of bags (Zhang et al. 2024, ACMIL, arXiv:2311.07125), in both of its forms.

    A stack before it, where the config has one, is ours: linear map, transformer, norm.

    Args:
      config: checked at construction.
      rngs: stream `params`.
    """

    Config = BagConfig

    def __init__(self, config: BagConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.layers:
            args = dict(rngs=rngs, dtype=config.compute_dtype, role=Role.EMBEDDING)
            self.embedding = Linear(config.inputs, config.width, (None, "embed"), **args)
            self.transformer = Transformer(config, rngs=rngs)
            self.norm = config.make_norm()
        pooling = bag_queries.QueryPooling if config.form == "queries" else Pooling
        self.pooling = pooling(config, config.width if config.layers else config.inputs, rngs=rngs)

    @classmethod
    def batch_spec(cls, config: BagConfig, length: int) -> batch_lib.Spec:
        """`segments` are 1 for a bag's instances, which come first, and 0 behind them."""
        one = batch_lib.Field((1,), "float32", (None,))
        return {
            "inputs": batch_lib.Field((length, config.inputs), "float32", ("seq", None)),
            "segments": batch_lib.Field((length,), "int32", ("seq",)),
            "targets": dataclasses.replace(one, dtype="int32", ids=config.classes, said="model.classes"),
            "weights": one,
            "slices": batch_lib.Field((1, None), "int8", (None, None), optional=True),
        }

    def read(self, batch: Batch, key: jax.Array | None) -> tuple[Any, mixers.MixerOutput]:
        """What the pooling gives, and the output of the stack; `key` turns dropout and masking on."""
        of_stack, of_pooling = (None, None) if key is None else jax.random.split(key)
        out = mixers.MixerOutput(batch["inputs"])
        if self.config.layers:
            seq = dataclasses.replace(mixers.Sequence.whole(*batch["segments"].shape), segments=batch["segments"])
            out = self.transformer(self.embedding(batch["inputs"]), seq, of_stack)
            out = dataclasses.replace(out, y=self.norm(out.y))
        return self.pooling(out.y, batch["segments"] > 0, of_pooling), out

    def loss(self, batch: Batch, key: jax.Array | None, options: Mapping[str, Any]) -> Sums:
        """Means over bags by their weights: the bag's cross-entropy, the branches' mean one and, of several, the mean
        cosine of their attention, over heads where there are some."""
        (bag, branches, a), out = self.read(batch, key)
        weights_B, targets_B = batch["weights"][:, 0].astype(bag.dtype), batch["targets"][:, 0]
        losses = {"loss": jnp.sum(weights_B * _nll(bag, targets_B))}
        if branches.shape[1]:
            each_BM = _nll(branches, jnp.broadcast_to(targets_B[:, None], branches.shape[:2]))
            losses["branch_loss"] = jnp.sum(weights_B * jnp.mean(each_BM, axis=1))
        if self.config.branches > 1:
            losses["diversity_loss"] = jnp.sum(weights_B * jnp.mean(likeness(a).reshape(len(bag), -1), axis=1))
        tokens = jnp.sum(batch["segments"] > 0).astype(bag.dtype)
        return Sums.of(losses, out, weight=jnp.sum(weights_B), tokens=tokens)

    def evaluate(self, batch: Batch, options: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Of the bag's classifier: `nll`, `tokens` (the weights) and `correct` [1], and what `Scores` is made of."""
        (bag, _, _), _ = self.read(batch, None)
        weights = batch["weights"].astype(bag.dtype)
        nll = weights * _nll(bag, batch["targets"][:, 0])[:, None]
        right = jnp.argmax(bag, axis=-1)[:, None] == batch["targets"]
        sums = {"nll": nll, "tokens": weights, "correct": right * weights}
        sums = {name: jnp.sum(value, axis=0) for name, value in sums.items()}
        return sums | sums_of_scores(nll, weights, right, batch.get("slices"))

    @classmethod
    def summarize(cls, sums: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Scores:
        return Scores(dict(sums), facts)

    @classmethod
    def cost(cls, config: BagConfig, length: int) -> ModelCost:
        D, M, heads = config.width, config.branches, config.branches + 1 if config.branches > 1 else 1
        stack = stack_cost(config, length) if config.layers else ModelCost(0, 0, {}, 0)
        embedding, inputs = (config.inputs * D, D) if config.layers else (0, config.inputs)
        norm = config.norm_parameters if config.layers else 0
        if config.form == "queries":
            own, pooling = bag_queries.cost(config, inputs, length)
            flops = {"embedding": 2.0 * embedding, "pooling": pooling}
            parameters = stack.parameters + embedding + norm + own
            return dataclasses.replace(
                stack, parameters=parameters, embedding_parameters=embedding, flops=flops | stack.flops
            )
        maps = inputs * D + 2 * D * config.gate_width + config.gate_width * M
        parameters = stack.parameters + embedding + maps + 2 * config.gate_width + M + heads * (D + 1) * config.classes
        parameters += norm
        flops = {"embedding": 2.0 * embedding, "pooling": 2.0 * (maps + M * D)}
        flops["head"] = 2.0 * heads * D * config.classes / length
        return dataclasses.replace(
            stack, parameters=parameters, embedding_parameters=embedding, flops=flops | stack.flops
        )
