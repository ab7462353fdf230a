"""What the implementations of neural memory share: its description and state, the network, and a chunk at once.

See `attnlab.ops.neural_memory`. Shapes: B batch, T positions, C chunk, H heads, d width of a head, i and o widths of a
layer's input and output.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnlab.ops.chunk_steps import ChunkStep, choose_rows
from attnlab.ops.two_stage import TwoStage, before, two_stage
from attnlab.parallel.sequence_parallel import SequenceParallel

Layers = tuple[jax.Array, ...]  # one array per layer of the memory, [..., i, o]

ACTIVATIONS = ("gelu_tanh", "gelu")
_GELU = math.sqrt(2 / math.pi)


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """What the memory is and how it learns.

    Attributes:
      chunk: steps whose gradients are taken at the same weights.
      residual_norm: M(x) = x + LN(net(x)) instead of net(x); LN without learned parameters.
      rates: step of each layer relative to theta, last that of the norm's scale where there is one.
      grad_at: "prev": gradients are taken at W_{t'}; "decayed": at keep_{t'+1} ... keep_t W_{t'}, what forgetting has
        left of it.
      read_after_write: y_t reads W_t; else W_{t-1}.
      activation: between the layers, one of `ACTIVATIONS`: GELU in its tanh form, or by erf.
      norm_scale: M(x) = x + (1 + g) LN(net(x)); g [..., 1, d] is the last of the memory's weights, and learns and is
        forgotten as they are.
      epsilon: added to the variance in LN.
    """

    chunk: int
    residual_norm: bool
    rates: tuple[float, ...]
    grad_at: str = "prev"
    read_after_write: bool = True
    activation: str = "gelu_tanh"
    norm_scale: bool = False
    epsilon: float = 1e-6

    def parts(self, weights: Layers) -> tuple[Layers, jax.Array | None]:
        """The network's layers, and g."""
        return (weights[:-1], weights[-1]) if self.norm_scale else (weights, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryState:
    """The memory after some positions.

    Attributes:
      weights, momentum: W and S, [B, H, i, o] per layer; momentum is empty where there is none.
      start: the weights at which the present chunk takes its gradients.
      log_keep_BH: log of what forgetting has left of `start`.
      position_B: int32, positions of the document so far.
    """

    weights: Layers
    momentum: Layers
    start: Layers
    log_keep_BH: jax.Array
    position_B: jax.Array

    def restarted(self, initial: MemoryState, where_B: jax.Array) -> MemoryState:
        """`initial` in the rows named, else as it is."""
        return choose_rows(where_B, initial, self)


def initial_state(weights: Layers, batch: int, momentum: bool) -> MemoryState:
    """The state before a document, from the initial weights [H, i, o]."""
    start = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in weights)
    heads = weights[0].shape[0]
    return MemoryState(
        weights=start,
        momentum=tuple(jnp.zeros_like(w) for w in start) if momentum else (),
        start=start,
        log_keep_BH=jnp.zeros((batch, heads), start[0].dtype),
        position_B=jnp.zeros((batch,), jnp.int32),
    )


# The network.


def forward(spec: MemorySpec, weights: Layers, x: jax.Array) -> jax.Array:
    """M_W(x) for x [..., d] and weights [..., i, o]."""
    layers, gain = spec.parts(weights)
    z = x
    for index, w in enumerate(layers):
        z = (gelu(z, spec.activation) if index else z) @ w
    return _around(spec, x, z, gain)


def gradients(
    spec: MemorySpec, weights: Layers, k: jax.Array, v: jax.Array, scale: jax.Array | None = None
) -> tuple[Layers, Layers]:
    """Inputs a and deltas of every layer: the gradient of `1/2 |M(k_t) - v_t|^2` is `a_t^T delta_t` for each step t.

    The norm's scale counts as a layer whose input is 1.

    Args:
      weights: [..., i, o]; k, v: [..., C, d].
      scale: [..., C], the gradient of step t is taken at scale_t times the weights; None: 1.
    """
    wide = 1.0 if scale is None else scale[..., None]
    layers, gain = spec.parts(weights)
    inputs, slopes, z = [], [], k
    for index, w in enumerate(layers):
        if index:
            slopes.append(gelu_slope(z, spec.activation))
            z = gelu(z, spec.activation)
        inputs.append(z)
        z = wide * (z @ w)
    of_gain = []
    if spec.residual_norm:
        y, deviation = normalized(z, spec.epsilon)
        if gain is None:
            error = k + y - v
        else:
            gain = 1 + wide * gain
            error = k + gain * y - v
            inputs.append(jnp.ones_like(k[..., :1]))
            of_gain.append(error * y)
            error = gain * error
        delta = error - jnp.mean(error, -1, keepdims=True) - y * jnp.mean(error * y, -1, keepdims=True)
        delta = delta / deviation
    else:
        delta = z - v
    deltas = [delta]
    for w, slope in zip(layers[:0:-1], reversed(slopes)):
        delta = wide * (delta @ jnp.swapaxes(w, -1, -2)) * slope
        deltas.append(delta)
    return tuple(inputs), (*reversed(deltas), *of_gain)


def _around(spec: MemorySpec, x: jax.Array, z: jax.Array, gain: jax.Array | None) -> jax.Array:
    """The memory's output from its network's, z."""
    if not spec.residual_norm:
        return z
    y, _ = normalized(z, spec.epsilon)
    return x + (y if gain is None else (1 + gain) * y)


def normalized(z: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(z - mean) / deviation over the last axis, and the deviation."""
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return centred / deviation, deviation


def gelu(z: jax.Array, form: str = "gelu_tanh") -> jax.Array:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2), "gelu" by erf or "gelu_tanh"."""
    if form == "gelu":
        return z * jax.scipy.stats.norm.cdf(z)
    return 0.5 * z * (1 + jnp.tanh(_GELU * (z + 0.044715 * z**3)))


def gelu_slope(z: jax.Array, form: str = "gelu_tanh") -> jax.Array:
    """The derivative of `gelu`."""
    if form == "gelu":
        return jax.scipy.stats.norm.cdf(z) + z * jax.scipy.stats.norm.pdf(z)
    t = jnp.tanh(_GELU * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * _GELU * z * (1 - t * t) * (1 + 3 * 0.044715 * z * z)


# A chunk at once.


def chunk_step(
    spec: MemorySpec, initial: MemoryState, state: MemoryState, inputs: tuple, slots: ChunkStep
) -> tuple[MemoryState, jax.Array]:
    """One chunk step: writes its positions and reads y [B, C, H, d].

    Args:
      initial: the state at which a document begins; rows [1, ...] or [B, ...].
      inputs: q, k, v [B, C, H, d], log_keep and log_eta [B, C, H] or None, theta [B, C, H].
    """
    q, k, v, log_keep, log_eta, theta = (None if x is None else jnp.swapaxes(x, 1, 2) for x in inputs)
    theta = jnp.where(slots.kept()[:, None], theta, 0)
    seen = slots.seen()[:, None]
    log_keep = jnp.zeros_like(theta) if log_keep is None else log_keep
    stage = two_stage(log_keep, log_eta, seen)

    base = state.restarted(initial, slots.fresh_B)
    begins_B = slots.position_BC[:, 0] % spec.chunk == 0
    start = choose_rows(begins_B, base.weights, base.start)
    log_kept_BH = jnp.where(begins_B[:, None], 0, base.log_keep_BH)
    scale = jnp.exp(log_kept_BH[..., None] + stage.log_keep_C) if spec.grad_at == "decayed" else None
    inner, deltas = gradients(spec, start, k, v, scale)
    steps = tuple(rate * theta[..., None] * delta for rate, delta in zip(spec.rates, deltas))

    read = stage if spec.read_after_write else before(stage, seen)
    y = _read(spec, read, base, inner, steps, q)

    weights, momentum = _write(stage, base, inner, steps, slots)
    after = MemoryState(
        weights=weights,
        momentum=momentum,
        start=start,
        log_keep_BH=log_kept_BH + slots.at_last(stage.log_keep_C),
        position_B=jnp.take_along_axis(slots.position_BC, slots.last_B[:, None], axis=1)[:, 0] + 1,
    )
    return choose_rows(slots.taken_B, after, state), jnp.swapaxes(y, 1, 2)


def _read(
    spec: MemorySpec, stage: TwoStage, base: MemoryState, inner: Layers, steps: Layers, q: jax.Array
) -> jax.Array:
    """M_{W_t}(q_t) without W_t: each layer's weights are W, S and the chunk's steps, weighted by the coefficients."""

    def layer(index, z):
        w, a, step = base.weights[index], inner[index], steps[index]
        change = (stage.kappa_CC * (z @ jnp.swapaxes(a, -1, -2))) @ step
        if base.momentum:
            kept, moved = jnp.split(z @ jnp.concatenate([w, base.momentum[index]], axis=-1), 2, axis=-1)
            return stage.beta_C[..., None] * kept + stage.rho_C[..., None] * moved - change
        return stage.beta_C[..., None] * (z @ w) - change

    depth, z = len(spec.parts(base.weights)[0]), q
    for index in range(depth):
        z = layer(index, gelu(z, spec.activation) if index else z)
    return _around(spec, q, z, layer(depth, jnp.ones_like(q[..., :1])) if spec.norm_scale else None)


def _write(stage: TwoStage, base: MemoryState, inner: Layers, steps: Layers, slots: ChunkStep) -> tuple[Layers, Layers]:
    """W and S after the chunk step's last position."""
    last = jax.tree.map(slots.at_last, stage)
    wide = lambda row: row[..., None, None]
    weights, momentum = [], []
    for index, (w, a, step) in enumerate(zip(base.weights, inner, steps)):
        change = last.kappa_CC[..., None] * step
        if base.momentum:
            change = jnp.concatenate([change, last.momentum_CC[..., None] * step], axis=-1)
        change = jnp.swapaxes(a, -1, -2) @ change
        w = wide(last.beta_C) * w
        if base.momentum:
            s = base.momentum[index]
            change, moved = jnp.split(change, 2, axis=-1)
            w += wide(last.rho_C) * s
            momentum.append(wide(last.h_C) * s - moved)
        weights.append(w - change)
    return tuple(weights), tuple(momentum)


# For the choice of an implementation.


@dataclasses.dataclass(frozen=True)
class NeuralMemorySpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `neural_memory`."""

    batch: int
    positions: int
    heads: int
    widths: tuple[int, ...]
    dtype: str
    packed: bool
    memory: MemorySpec

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} layers {'x'.join(map(str, self.widths))}"
        return " ".join([shape, f"C{self.memory.chunk}", self.dtype, *(["packed"] if self.packed else [])])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, initial, state, inputs, documents, *, memory: MemorySpec, begins: bool
    ) -> NeuralMemorySpec:
        """Of the arrays of a device; where positions are split over several, of one row at a time."""
        del begins
        q, alone = inputs[0], exchange is None
        layers, _ = memory.parts(initial.weights)
        widths = tuple(w.shape[-1] for w in (layers[0].swapaxes(-1, -2), *layers))
        batch = q.shape[0] if alone else 1
        return cls(batch, *q.shape[1:3], widths, str(q.dtype), documents is not None or not alone, memory)
