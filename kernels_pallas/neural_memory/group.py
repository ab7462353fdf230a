"""A group of chunks at once, on values: what is read, and what becomes of the weights.

W and S stand still while a group is taken: the weights that a chunk of it sees are
`beta W + rho S - sum_i kappa_i a_i^T delta_i` over the group's steps before it, and each product with them is one with
[W S] and one with those steps. Lists are over heads: phases of all heads stand together, so that latencies overlap.

R positions of a group, C of a chunk, i and o the widths of a layer. Logarithms are in units of log2. Hidden activations
are kept doubled, the halves go into the narrow side of products.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.neural_memory.call import Call

F32 = jnp.float32
NN, NT, TN = ((((a,), (b,)), ((), ())) for a, b in ((1, 0), (1, 1), (0, 0)))
_GELU, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _product(a: jax.Array, b: jax.Array, dims: Any, dtype: str) -> jax.Array:
    precision = "highest" if dtype == "float32" else None
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dims, precision=precision, preferred_element_type=F32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a: jax.Array, b: jax.Array, dims: Any, dtype: str) -> jax.Array:
    """A product in `dtype` with a float32 result; so are those of its gradient."""
    return _product(a, b, dims, dtype)


def _dot_forward(a, b, dims, dtype):
    return _product(a, b, dims, dtype), (a.astype(dtype), b.astype(dtype))


def _dot_backward(dims, dtype, saved, g):
    a, b = saved
    if dims == NN:
        return _product(g, b, NT, dtype), _product(a, g, TN, dtype)
    if dims == NT:
        return _product(g, b, NN, dtype), _product(g, a, TN, dtype)
    return _product(b, g, NT, dtype), _product(a, g, NN, dtype)


dot.defvjp(_dot_forward, _dot_backward)


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Of one head: see `attnlab.ops.two_stage`; columns [R, 1], and of the group's last position [1, 1] or columns."""

    beta: jax.Array
    rho: jax.Array
    kappa: jax.Array
    theta: jax.Array
    log_keep: jax.Array
    last_beta: jax.Array
    last_rho: jax.Array
    last_h: jax.Array
    last_kappa: jax.Array
    last_moved: jax.Array


def each(f, *lists):
    """f of every head."""
    return [f(*x) for x in zip(*lists, strict=True)]


def coefficients(call: Call, gates: jax.Array, begin: jax.Array, taken: jax.Array) -> list[Coefficients]:
    """Of every head.

    Args:
      gates: [R, 3 hb], columns of log keep, then of log eta, then of theta; 0 behind the last position.
      begin: [R, 1], position in the group at which each one's document begins (0 or less: at or before the first).
      taken: positions of the group.
    """
    R, heads = gates.shape[0], gates.shape[1] // 3
    row, col = (jax.lax.broadcasted_iota(jnp.int32, (R, R), axis) for axis in (0, 1))
    seen, eye = (row >= col) & (col.astype(F32) >= begin), row == col
    is_last = jax.lax.broadcasted_iota(jnp.int32, (R, 1), 0) == taken - 1
    as_row = lambda x: jnp.sum(jnp.where(eye, x, 0), axis=0, keepdims=True)
    as_column = lambda x: jnp.sum(jnp.where(eye, x, 0), axis=1, keepdims=True)
    at_last = lambda x: jnp.sum(jnp.where(is_last, x, 0), axis=0, keepdims=True)
    sums = jax.lax.dot_general(
        jnp.where(seen, 1.0, 0.0), gates[:, : 2 * heads], NN, precision="highest", preferred_element_type=F32
    )
    column = lambda x, h: x[:, h : h + 1]
    logs = [[column(sums, part * heads + h) for h in range(heads)] for part in (0, 1)]
    # A large negative exponent, not a product with 0: what is not seen may be large.
    products = lambda x: jnp.exp2(jnp.where(seen, x - as_row(x), -1e9))
    keep, moved = each(products, logs[0]), each(products, logs[1])
    kappa = each(lambda a, b: dot(a, b, NN, call.dtype), keep, moved)
    h = each(jnp.exp2, logs[1])
    rho = each(lambda a, x: jnp.sum(a * as_row(x), axis=1, keepdims=True), keep, h)
    beta = each(jnp.exp2, logs[0])
    ends = (each(at_last, x) for x in (beta, rho, h))
    columns = (each(lambda x: as_column(at_last(x)), x) for x in (kappa, moved))
    theta = [column(gates, 2 * heads + h) for h in range(heads)]
    return [Coefficients(*x) for x in zip(beta, rho, kappa, theta, logs[0], *ends, *columns, strict=True)]


def gelu2(z: jax.Array) -> jax.Array:
    """Twice GELU in its tanh form."""
    return z * (1 + jnp.tanh(z * (_GELU + _GELU * _CUBIC * (z * z))))


def gelu2_slope(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`gelu2` and its derivative."""
    square = z * z
    h = 1 + jnp.tanh(z * (_GELU + _GELU * _CUBIC * square))
    a = z * h
    return a, h + a * (2 - h) * (_GELU + 3 * _GELU * _CUBIC * square)


def _mean(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True) * (1.0 / x.shape[-1])


def normalized(z: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(z - mean) / deviation over the last axis, and 1 / deviation."""
    centred = z - _mean(z)
    inverse = jax.lax.rsqrt(_mean(centred * centred) + epsilon)
    return centred * inverse, inverse


class Group:
    """A group of all heads of a grid step.

    Args:
      weights: for each head, for each layer a function that gives [W S] as `Call.shapes` has them.
      q, k, v: for each head [R, d], 0 behind the last position.
      several: 1.0 if the group is several documents, which see nothing of each other, else 0.0.
      opens: [R, 1], where a document begins.
      kept: dtype of inputs and steps; of the products, but float32 where gradients are to add up in them.
      narrow: dtype of what lies between products in hidden layers.
    """

    def __init__(self, call: Call, weights, q, k, v, coefficients: list[Coefficients], several, opens, kept, narrow):
        self.call, self.weights, self.q, self.k, self.v = call, weights, q, k, v
        self.coefficients, self.several, self.opens = coefficients, several, opens
        self.kept, self.narrow = kept, narrow
        self.heads = range(len(q))
        # Of every head, for each layer one array per chunk: inputs [C, i] and steps [C, o].
        self.inputs = [[[] for _ in range(call.depth)] for _ in self.heads]
        self.steps = [[[] for _ in range(call.depth)] for _ in self.heads]

    def dot(self, a: jax.Array, b: jax.Array, dims: Any = NN) -> jax.Array:
        return dot(a, b, dims, self.call.dtype)

    def outputs(self) -> list[jax.Array]:
        """y [R, d] of every head; leaves the steps."""
        return self._read(*self.learn(self.q))

    def learn(self, q: list[jax.Array] | None = None) -> tuple[list[jax.Array], list[jax.Array], list[tuple]] | None:
        """Takes the steps. For queries: their first layer by W and S, their scores, and what they are read with."""
        call, R = self.call, self.call.rows
        early = self._early()
        read = None if q is None else self._read_coefficients()
        rows = self.k if q is None else each(lambda k, q: jnp.concatenate([k, q], axis=0), self.k, q)
        scales = [e[:2] for e in early]
        if q is not None:
            scales = [[jnp.concatenate([e[n], c[n]], axis=0) for n in (0, 1)] for e, c in zip(early, read)]
        wide = each(lambda x, s: jnp.concatenate([x * s[0], x * s[1]], axis=1), rows, scales)
        first = each(lambda x, w: self.dot(x, w[0]()), wide, self.weights)
        scores = each(lambda x, k: self.dot(x, k, NT), rows, self.k)
        for m in range(call.group):
            self._learn(m, [x[:R] for x in first], [x[:R] for x in scores], early)
        of_heads = lambda lists: [[jnp.concatenate(parts, axis=0) for parts in layers] for layers in lists]
        self.whole = of_heads(self.inputs), of_heads(self.steps)
        return None if q is None else ([x[R:] for x in first], [x[R:] for x in scores], read)

    def _early(self) -> list[tuple]:
        """beta and rho [R, 1] of the weights before each chunk, and for each chunk kappa's row [1, m C]."""
        C, out = self.call.chunk, []
        for c in self.coefficients:
            beta, rho, kappa = [jnp.ones((C, 1), F32)], [jnp.zeros((C, 1), F32)], [None]
            for m in range(1, self.call.group):
                row = slice(m * C - 1, m * C)
                one = 1 - self.several
                beta.append(jnp.broadcast_to(self.several + one * c.beta[row], (C, 1)))
                rho.append(jnp.broadcast_to(one * c.rho[row], (C, 1)))
                kappa.append(one * c.kappa[row, : m * C])
            out.append((jnp.concatenate(beta, axis=0), jnp.concatenate(rho, axis=0), kappa))
        return out

    def _read_coefficients(self) -> list[tuple]:
        """beta, rho and kappa of the weights that each position reads."""
        if self.call.read_after_write:
            return [(c.beta, c.rho, c.kappa) for c in self.coefficients]
        before = lambda x, fill: jnp.concatenate([jnp.full((1, x.shape[1]), fill, F32), x[:-1]], axis=0)
        out = []
        for c in self.coefficients:
            beta, rho, kappa = before(c.beta, 1.0), before(c.rho, 0.0), before(c.kappa, 0.0)
            out.append((jnp.where(self.opens, 1.0, beta), *(jnp.where(self.opens, 0.0, x) for x in (rho, kappa))))
        return out

    def _chunk(self, m: int) -> slice:
        return slice(m * self.call.chunk, (m + 1) * self.call.chunk)

    def _before(self, parts: list[list[list[jax.Array]]], h: int, layer: int) -> jax.Array:
        return jnp.concatenate(parts[h][layer], axis=0)

    def _learn(self, m: int, first: list[jax.Array], scores: list[jax.Array], early: list[tuple]) -> None:
        """Chunk m: its inputs and steps in every layer, theta in them but not the layers' rates."""
        call, at, C = self.call, self._chunk(m), self.call.chunk
        scale = self._scale(m)
        beta, rho = [e[0][at] for e in early], [e[1][at] for e in early]
        z, slopes = [x[at] for x in first], []
        inputs = [k[at] for k in self.k]
        for layer in range(call.depth):
            if layer:
                doubled = each(lambda x: gelu2_slope(x.astype(self.narrow)), z)
                inputs, slope = [x[0] for x in doubled], [x[1] for x in doubled]
                slopes.append(slope)
                z = each(lambda x, w: self.dot(x, w[layer]()), inputs, self.weights)
                z = each(lambda x, b, r: self._halves(x, b, r, 0.5), z, beta, rho)
            if m:
                rate, before = call.rates[layer] * (0.25 if layer else 1.0), range(len(z))
                near = (
                    [x[at, : m * C] for x in scores]
                    if layer == 0
                    else [self.dot(inputs[h], self._before(self.inputs, h, layer), NT) for h in before]
                )
                near = each(lambda x, e: rate * e[2][m] * x, near, early)
                z = [z[h] - self.dot(near[h], self._before(self.steps, h, layer)) for h in before]
            z = z if scale is None else each(lambda x, s: x * s, z, scale)
            for h in self.heads:
                self.inputs[h][layer].append(inputs[h].astype(self.kept))
        theta = [c.theta[at] for c in self.coefficients]
        delta = each(self._error, z, [k[at] for k in self.k], [v[at] for v in self.v], theta)
        found = [delta]
        for layer in range(call.depth - 1, 0, -1):
            stacked = each(lambda x, b, r: jnp.concatenate([x * (0.5 * b), x * (0.5 * r)], axis=1), delta, beta, rho)
            back = each(lambda x, w: self.dot(x, w[layer](), NT), stacked, self.weights)
            if m:
                near = [self.dot(delta[h], self._before(self.steps, h, layer), NT) for h in self.heads]
                near = each(lambda x, e: 0.25 * call.rates[layer] * e[2][m] * x, near, early)
                old = [jnp.concatenate(self.inputs[h][layer][:m], axis=0) for h in self.heads]
                back = each(lambda b, x, a: b - self.dot(x, a), back, near, old)
            delta = each(lambda b, s: b.astype(self.narrow) * s, back, slopes[layer - 1])
            delta = delta if scale is None else each(lambda x, s: x * s, delta, scale)
            found.append(delta)
        for layer, deltas in enumerate(reversed(found)):
            for h in self.heads:
                self.steps[h][layer].append(deltas[h].astype(self.kept))

    def _scale(self, m: int) -> list[jax.Array] | None:
        """What forgetting has left, at each position, of its chunk's first weights; None: gradients ask not."""
        if not self.call.decayed:
            return None
        at, C, logs = self._chunk(m), self.call.chunk, [c.log_keep for c in self.coefficients]
        if m == 0:
            return [jnp.exp2(x[at]) for x in logs]
        return [jnp.exp2(x[at] - (1 - self.several) * x[m * C - 1 : m * C]) for x in logs]

    def _halves(self, x: jax.Array, beta: jax.Array, rho: jax.Array, scale: float) -> jax.Array:
        """A product with [W S] side by side, as one with `beta W + rho S`."""
        o = x.shape[1] // 2
        return (scale * beta) * x[:, :o] + (scale * rho) * x[:, o:]

    def _error(self, z: jax.Array, k: jax.Array, v: jax.Array, theta: jax.Array) -> jax.Array:
        """The loss' gradient at the network's output, times theta."""
        if not self.call.residual_norm:
            return (z - v) * theta
        x, inverse = normalized(z, self.call.epsilon)
        error = k + x - v
        return (error - _mean(error) - x * _mean(error * x)) * (inverse * theta)

    def _read(self, first: list[jax.Array], scores: list[jax.Array], read: list[tuple]) -> list[jax.Array]:
        call, z = self.call, first
        inputs, steps = self.whole
        for layer in range(call.depth):
            if layer:
                g = each(lambda x: gelu2(x.astype(self.narrow)), z)
                z = each(lambda x, w: self.dot(x, w[layer]()), g, self.weights)
                z = each(lambda x, c: self._halves(x, c[0], c[1], 0.5), z, read)
                scores = [self.dot(g[h], inputs[h][layer], NT) for h in self.heads]
            rate = call.rates[layer] * (0.25 if layer else 1.0)
            near = each(lambda x, c: rate * c[2] * x, scores, read)
            z = [z[h] - self.dot(near[h], steps[h][layer]) for h in self.heads]
        if not call.residual_norm:
            return z
        return each(lambda q, x: q + normalized(x, call.epsilon)[0], self.q, z)

    def after(self, h: int, layer: int, state: jax.Array) -> jax.Array:
        """[W S] of a head's layer after the group."""
        c, rate = self.coefficients[h], self.call.rates[layer]
        inputs, steps = self.whole[0][h][layer], self.whole[1][h][layer]
        coefficients = (c.last_kappa, c.last_moved)
        if layer == 0:
            half, axis = state.shape[0] // 2, 0
            scaled = jnp.concatenate([inputs.astype(F32) * (rate * x) for x in coefficients], axis=1)
            change = self.dot(scaled, steps, TN)
            w, s, dw, ds = state[:half], state[half:], change[:half], change[half:]
        else:
            half, axis = state.shape[1] // 2, 1
            scaled = jnp.concatenate([steps.astype(F32) * (0.5 * rate * x) for x in coefficients], axis=1)
            change = self.dot(inputs, scaled, TN)
            w, s, dw, ds = state[:, :half], state[:, half:], change[:, :half], change[:, half:]
        w = c.last_beta * w + c.last_rho * s - dw
        return jnp.concatenate([w, c.last_h * s - ds], axis=axis)
