"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from attnlab.models.objective import require_own
from attnlab.parallel import partition
from attnlab.train import optimizers, sharding
from attnlab.train.config import TrainConfig
from attnlab.train.state import Model, TrainState
from attnlab.train.teaching import Teaching

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# What a step and the loop report themselves, besides what begins with `heldout_`.
_RESERVED = (
    "step", "weight", "tokens", "step_tokens", "tokens_per_second", "step_seconds", "mfu", "grad_norm",
    "learning_rate", "nonfinite", "skipped", "goodput", "peak_bytes", "host_seconds_min", "host_seconds_max",
    "slowest_process",
)  # fmt: skip


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    rate: optax.Schedule,
    mesh: Mesh | None = None,
    factors: Any = None,
    teaching: Teaching | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step `(state, batch) -> (state, metrics)`; with a teacher `(state, batch, its parameters)`.

    The loss is the mean over the weights of the whole batch, however it is split into micro-batches or over devices. A
    step whose loss or gradients are not finite changes no parameter and no moment, and is counted.

    Args:
      model: the model.
      tx: the optimizer; its first part may clip.
      config: of the training.
      rate: learning rate by step, for the metrics.
      mesh: where it runs; None: on one device.
      factors: tree like the parameters; no gradient is computed where it is 0. None: all have one.
      teaching: of what teacher the model learns; None: of the data alone.
    """

    options = {name: getattr(config, name) for name in model.objective.options}

    def micro_loss(
        teacher: Any, step: jax.Array, params: Any, micro: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Loss summed over the micro-batch, and the sums of all that is logged."""
        if factors is not None:
            params = jax.tree.map(lambda f, p: p if f else jax.lax.stop_gradient(p), factors, params)
        student = model.merge(params)
        given = options | {"step": step} if student.counts else options
        if teaching is None:
            sums = student.loss(micro, key, given)
        else:
            other = teaching.model.merge(jax.lax.stop_gradient(teacher))
            sums = student.distill(other, micro, key, given, teaching.matching)
        logged = sums.losses | sums.metrics
        require_own(name for name in logged if name in _RESERVED or name.startswith("heldout_"))
        return sums.total, logged | {"weight": sums.weight, "tokens": sums.tokens}

    def train_step(state: TrainState, batch: Batch, teacher: Any = None) -> tuple[TrainState, Metrics]:
        key = None
        if model.config.draws:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradient = jax.value_and_grad(functools.partial(micro_loss, teacher, state.step), has_aux=True)
        if config.accumulate == 1:
            (_, sums), grads = gradient(state.params, batch, key)
        else:
            grads, sums = _accumulate(gradient, state.params, batch, key, config.accumulate)
        tokens, weight = sums.pop("tokens"), sums.pop("weight")
        share = 1 / jnp.maximum(weight, 1)
        grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
        metrics = {name: value * share for name, value in sums.items()}

        norm = optax.tree.norm(optimizers.without_averages(grads, model.usages))
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = _after(state, params, opt_state, finite, config)
        updates_before = state.step - state.skipped  # skipped steps are not steps of the optimizer
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate(updates_before)),
            "step_tokens": tokens,
            "nonfinite": new_state.nonfinite,
            "skipped": new_state.skipped,
        }
        return new_state, metrics

    return partition.traced(train_step, mesh, sharding.ACTIVATION_RULES)


def _after(state: TrainState, params: Any, opt_state: Any, finite: jax.Array, config: TrainConfig) -> TrainState:
    """The next state, with these parameters and this state of the optimizer where the step was finite."""
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    bad = 1 - finite.astype(jnp.int32)
    ema = None
    if config.ema:
        ema = keep(_averaged(config.ema, state.step - state.skipped, state.ema, params), state.ema)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        nonfinite=(state.nonfinite + 1) * bad,
        skipped=state.skipped + bad,
        ema=ema,
    )


def _averaged(decay: float, updates: jax.Array, ema: Any, params: Any) -> Any:
    """The averaged weights after an update that `updates` came before: young ones forget faster."""
    t = updates.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda w, p: w + share.astype(w.dtype) * (p.astype(w.dtype) - w), ema, params)


def _accumulate(gradient: Any, params: Any, batch: Batch, key: jax.Array | None, parts: int) -> tuple[Any, Metrics]:
    """Sums of gradients and metrics over `parts` micro-batches, one in memory at a time."""
    # Rows go to micro-batches round-robin, so that a batch split over devices needs no exchange.
    micro = {k: jnp.moveaxis(v.reshape(-1, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}
    keys = None if key is None else jax.random.split(key, parts)

    def add(total: Any, inputs: Any) -> tuple[Any, None]:
        part, k = inputs
        (_, sums), grads = gradient(params, part, k)
        return jax.tree.map(jnp.add, total, (grads, sums)), None

    first = jax.tree.map(lambda v: v[0], micro)
    shapes = jax.eval_shape(gradient, params, first, None if keys is None else keys[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0][1]))
    total, _ = jax.lax.scan(add, zero, (micro, keys))
    return total


def make_eval_step(model: Model, config: TrainConfig, mesh: Mesh | None = None) -> Callable[[Any, Batch], Metrics]:
    """The step `(params, batch) -> sums`.

    Args:
      model: the model.
      config: of the training.
      mesh: where it runs; None: on one device.

    Returns:
      Sums over the batch, as the model's `Objective.evaluate` makes them.
    """
    options = {name: getattr(config, name) for name in model.objective.options}

    def eval_step(params: Any, batch: Batch) -> Metrics:
        return model.merge(params).evaluate(batch, options)

    return partition.traced(eval_step, mesh, sharding.ACTIVATION_RULES)
