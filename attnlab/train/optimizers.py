"""Optimizers and learning-rate schedules, by config node; the algorithms are optax's.

What is decayed, and what Muon orthogonalises, follows from the role that each parameter states where it is made:

| roles | decayed | with muon |
|---|---|---|
| matrix | yes | Muon, each part of a fused one by itself |
| embedding, output, bias, scale, taps, positions, tokens, decay_rate, memory | no | AdamW |
| average | no | none: it becomes `keep` of itself and the rest of what its gradient says |

`attnlab.mixers.roles.Role` has what each is and why; `attnlab list NAME --parameters` prints a mixer's.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from attnlab import config as config_lib
from attnlab.errors import ConfigError
from attnlab.mixers.roles import Role, Usage


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What all optimizers share.

    Attributes:
      learning_rate: peak of the schedule.
      schedule: cosine, wsd (warm-up, stable, decay) or constant.
      warmup: linear warm-up from 0: a number of steps, or below 1 a share of train.steps. A number that is not below
        train.steps counts as a tenth of them.
      decay: fraction of the steps that wsd decays linearly over, at the end.
      final: last learning rate of cosine and wsd, as a fraction of the peak.
      weight_decay: decoupled decay, times the learning rate; only on parameters whose role is matrix.
      clip: global norm that gradients are clipped to; none: no clipping.
      rates: `pattern=factor`: the learning rate of the parameters whose dotted path the pattern matches (* and ?), and
        with it their decay, times a factor; of several that match the last. 0 freezes: no update, no decay, no state.
    """

    node_name: ClassVar[str]

    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup: int | float = 100
    decay: float = 0.2
    final: float = 0.1
    weight_decay: float = 0.1
    clip: float | None = 1.0
    rates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        need = config_lib.require
        for given in self.rates:
            pattern, _, factor = given.rpartition("=")
            possible = bool(pattern) and re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", factor) is not None
            possible = possible and (float(factor) == 0 or 2.0**-126 <= float(factor) < 2.0**64)
            need(possible, "optimizer.rates", given, "PATTERN=FACTOR, a factor of 0 or more, e.g. *embedding*=0")
        need(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "above 0")
        config_lib.require_choice("optimizer.schedule", self.schedule, ["cosine", "wsd", "constant"])
        need(
            0 <= self.warmup < 1 or (self.warmup >= 1 and self.warmup % 1 == 0),
            "optimizer.warmup",
            self.warmup,
            "a share below 1 of train.steps, or a whole number of steps, 0 or more",
        )
        need(0 < self.decay <= 1, "optimizer.decay", self.decay, "above 0, at most 1")
        need(0 <= self.final <= 1, "optimizer.final", self.final, "0 to 1")
        need(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        need(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "above 0, or none")


def _beta(key: str, value: float) -> None:
    config_lib.require(0 <= value < 1, f"optimizer.{key}", value, "0 or more, below 1")


@dataclasses.dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019); b1, b2: decay of the moments; epsilon: added to the root."""

    node_name: ClassVar[str] = "adamw"

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _beta("b1", self.b1)
        _beta("b2", self.b2)
        config_lib.require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "above 0")


@dataclasses.dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan 2024) on every layer's matrices; AdamW with Nesterov momentum on parameters of any other role.

    Matrices that share one kernel (queries, keys and values, say) are orthogonalised one by one.

    momentum: of Muon; iterations: Newton-Schulz steps; rms: root mean square that Muon's updates are scaled to, so that
    one learning rate serves both (Liu et al. 2025, Muon is Scalable, section 2.2); b1, b2: of AdamW.
    """

    node_name: ClassVar[str] = "muon"

    momentum: float = 0.95
    iterations: int = 5
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("momentum", "b1", "b2"):
            _beta(key, getattr(self, key))
        config_lib.require(self.iterations >= 1, "optimizer.iterations", self.iterations, "1 or more")
        config_lib.require(self.rms > 0, "optimizer.rms", self.rms, "above 0")


@dataclasses.dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023); its learning rate is about a tenth of AdamW's."""

    node_name: ClassVar[str] = "lion"

    learning_rate: float = 3e-4
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _beta("b1", self.b1)
        _beta("b2", self.b2)


@dataclasses.dataclass(frozen=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (Shazeer and Stern 2018), with updates scaled by the parameters' root mean square.

    decay_rate: exponent of the second moment's decay; a stack of layers counts as one tensor.
    """

    node_name: ClassVar[str] = "adafactor"

    learning_rate: float = 1e-2
    decay_rate: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(0 < self.decay_rate < 1, "optimizer.decay_rate", self.decay_rate, "above 0, below 1")


CONFIGS = {c.node_name: c for c in (AdafactorConfig, AdamWConfig, LionConfig, MuonConfig)}


def config_from_node(tree: Any, path: str) -> OptimizerConfig:
    """The typed config of a node `{"name": ..., **fields}`."""
    if dataclasses.is_dataclass(tree):
        return tree
    name, rest = config_lib.split_name(tree, path, list(CONFIGS))
    return config_lib.build(CONFIGS[name], rest, path)


def warmup_steps(warmup: float, steps: int) -> int:
    """What `optimizer.warmup` is in a run of `steps`: a number of steps, fewer than these."""
    if warmup < 1:
        return min(round(warmup * steps), steps - 1)
    return int(warmup) if warmup < steps else steps // 10


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step of a run of `steps`."""
    c, warmup = config, warmup_steps(config.warmup, steps)
    peak, last = c.learning_rate, c.learning_rate * c.final
    # Step 0 already learns: warm-up ends at step `warmup - 1`.
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    rest = steps - warmup
    if c.schedule == "cosine":
        return optax.join_schedules([ramp, optax.cosine_decay_schedule(peak, rest, c.final)], [warmup])
    if c.schedule == "wsd":
        decay = min(max(round(c.decay * steps), 1), rest)
        stages = [ramp, optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)]
        return optax.join_schedules(stages, [warmup, steps - decay])
    return optax.join_schedules([ramp, optax.constant_schedule(peak)], [warmup])


def build(config: OptimizerConfig, steps: int, usages: Any) -> optax.GradientTransformation:
    """The optax transformation, clipping included.

    Args:
      config: an optimizer node.
      steps: length of the run, for the schedule.
      usages: tree like the parameters; each leaf a `Usage`.
    """
    decayed = jax.tree.map(lambda usage: usage.role.decayed, usages)
    rate, c = schedule(config, steps), config
    if isinstance(c, AdamWConfig):
        tx = optax.adamw(rate, c.b1, c.b2, c.epsilon, weight_decay=c.weight_decay, mask=decayed)
    elif isinstance(c, LionConfig):
        tx = optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay, mask=decayed)
    elif isinstance(c, MuonConfig):
        labels = jax.tree.map(lambda usage: "muon" if usage.role.orthogonalised else "adam", usages)
        muon = optax.chain(
            _orthogonalised(c, usages),
            _scaled_by_shape(c.rms, usages),
            optax.add_decayed_weights(c.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
        # Without a mask, whose state would not fit older checkpoints: no role is decayed but not orthogonalised.
        adam = optax.adamw(rate, c.b1, c.b2, weight_decay=0.0, nesterov=True)
        tx = optax.partition({"muon": muon, "adam": adam}, labels)
    else:
        # optax's own weight decay here is not multiplied by the learning rate; this keeps one meaning for all.
        tx = optax.chain(
            optax.adafactor(None, decay_rate=c.decay_rate),
            optax.add_decayed_weights(-c.weight_decay, mask=decayed),
            optax.scale_by_schedule(rate),
        )
    tx = tx if c.clip is None else optax.chain(optax.clip_by_global_norm(c.clip), tx)
    if any(usage.role is Role.AVERAGE for usage in jax.tree.leaves(usages)):
        tx = _beside_averages(tx, usages)
    return _by_part(tx, factors(c, usages)) if c.rates else tx


def factors(config: OptimizerConfig, parameters: Any) -> Any:
    """Tree like `parameters`, each leaf the factor of its learning rate by `config.rates`; 0: it is frozen.

    Raises:
      ConfigError: a pattern matches no parameter, or all are frozen.
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    found = dict.fromkeys(paths, 1.0)
    for given in config.rates:
        pattern, _, factor = given.rpartition("=")
        matched = fnmatch.filter(paths, pattern)
        if not matched:
            near = config_lib.suggest(pattern, paths)
            raise ConfigError(
                f"optimizer.rates: {pattern!r} matches no parameter{near}; allowed: patterns (* and ?) of whole paths: "
                f"{', '.join(paths)}"
            )
        found |= dict.fromkeys(matched, float(factor))
    config_lib.require(
        any(found.values()), "optimizer.rates", config.rates, "at least one parameter that is not frozen"
    )
    return jax.tree.unflatten(jax.tree.structure(parameters), list(found.values()))


def _by_part(tx: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """Updates times their factors; of what is frozen `tx` sees nothing, so that it is in no norm and no state."""
    hidden = lambda tree: jax.tree.map(lambda f, x: x if f else optax.MaskedNode(), factors, tree)
    scaled = lambda f, moved, x: (moved if f == 1 else f * moved) if f else jnp.zeros_like(x)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, state = tx.update(hidden(updates), state, None if params is None else hidden(params))
        return jax.tree.map(scaled, factors, moved, updates), state

    return optax.GradientTransformation(lambda params: tx.init(hidden(params)), update)


def without_averages(tree: Any, usages: Any) -> Any:
    """The tree of what optimizers see: moving averages are left out, as what they call gradients are none."""
    return _over(lambda usage, x: optax.MaskedNode() if usage.role is Role.AVERAGE else x, usages, tree)


def _beside_averages(tx: optax.GradientTransformation, usages: Any) -> optax.GradientTransformation:
    """`tx` for all but moving averages, which move by `(1 - keep) (seen - average)`."""

    def one(usage: Usage, moved: Any, seen: Any, now: Any) -> Any:
        averaged = usage.role is Role.AVERAGE and not isinstance(seen, optax.MaskedNode)
        return (1 - usage.keep) * (seen.astype(now.dtype) - now) if averaged else moved

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, state = tx.update(without_averages(updates, usages), state, without_averages(params, usages))
        return jax.tree.map(one, usages, moved, updates, params), state

    return optax.GradientTransformation(lambda params: tx.init(without_averages(params, usages)), update)


# `optax.contrib.muon` but for fused kernels, which it takes for one matrix. Its state has the same form as that one's.


def _orthogonalised(c: MuonConfig, usages: Any) -> optax.GradientTransformation:
    """optax's Muon on the parts of every array; the state holds whole arrays under the parameters' own paths."""
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    inner = optax.contrib.scale_by_muon(
        ns_steps=c.iterations,
        beta=c.momentum,
        weight_dimension_numbers=lambda parts: jax.tree.map(lambda _: dimensions, parts),
    )
    split = lambda tree: _over(lambda u, x: u.fused.split(x) if u.fused else [x], usages, tree)
    join = lambda tree: _over(lambda u, parts: u.fused.join(parts) if u.fused else parts[0], usages, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        parts, state = inner.update(split(updates), state._replace(mu=split(state.mu)))
        return join(parts), state._replace(mu=join(state.mu))

    return optax.GradientTransformation(inner.init, update)


def _scaled_by_shape(rms: float, usages: Any) -> optax.GradientTransformation:
    """Orthogonal matrices [..., in, out], each part of a fused one by itself, times rms * sqrt(max(in, out))."""

    def one(usage: Usage, x: jax.Array) -> jax.Array:
        scale = lambda y: y * rms * max(y.shape[-2:]) ** 0.5
        return usage.fused.join([scale(part) for part in usage.fused.split(x)]) if usage.fused else scale(x)

    return optax.stateless(lambda updates, params: _over(one, usages, updates))


def _over(f: Callable[[Usage, Any], Any], usages: Any, tree: Any) -> Any:
    """`f(usage, x)` of every parameter that is in `tree`; `optax.partition` leaves out those of other optimizers."""
    apart = lambda usage, x: x if isinstance(x, optax.MaskedNode) else f(usage, x)
    return jax.tree.map(apart, usages, tree)
