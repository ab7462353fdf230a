"""TTT-Linear: per head an affine map under a layer norm, trained by gradient descent along the sequence, and read.

The map `f(x; W, b) = gain * normed(x W + b) + shift` learns to turn keys into `v - k`. With the loss
`1/2 |f(k_j) - (v_j - k_j)|^2`, `g_j` its gradient for `k_j W + b` at the weights with which the mini-batch begins,

    W_t = W_start - tau_t sum_j rate_j k_j^T g_j,      b_t = b_start - tau_t sum_j rate_j g_j,
    y_t = q_t + f(q_t; W_t, b_t)

over the j up to t in the mini-batch of t. tau is a number of each place in a mini-batch; the next one begins with the
weights of the last row. Mini-batches are counted from the beginning of each document.

Source: Sun et al. 2024, Learning to (Learn at Test Time): RNNs with Expressive Hidden States, arXiv:2407.04620,
sections 2.4 to 2.7.

Shapes: `B` batch, `T` positions, `H` heads, `d` width of a head, `C` places in a mini-batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.chunk_steps import ChunkStep, choose_rows, scan_aligned, scan_chunk_steps
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.documents import positions_in_documents
from attnlab.ops.memory_frame import normalized
from attnlab.parallel.sequence_parallel import SequenceParallel

_EPSILON = 1e-6  # added to the variance in the norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """An affine map per head, or a sum of steps of one.

    Attributes:
      weight: [B, H, d, d]; without B where it is the same for all rows.
      bias: [B, H, d].
    """

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x_BHCd: jax.Array) -> jax.Array:
        return x_BHCd @ self.weight + self.bias[..., None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TTTState:
    """The map after some positions.

    Attributes:
      start: with which the present mini-batch begins.
      steps: sum of `rate k^T g` and of `rate g` in it so far; 0 behind its last row.
      position_B: int32, positions of the document so far.
    """

    start: Affine
    steps: Affine
    position_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learned:
    """What is learned outside.

    Attributes:
      first: the map with which documents begin, without B.
      gain, shift: of the norm, [H, d].
      tau: [C], 0 or more.
    """

    first: Affine
    gain: jax.Array
    shift: jax.Array
    tau: jax.Array

    def begin(self, batch: int) -> TTTState:
        """The state before a document, rows [B, ...]."""
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), self.first)
        return TTTState(start, jax.tree.map(jnp.zeros_like, start), jnp.zeros((batch,), jnp.int32))


def _norm(learned: Learned, z: jax.Array) -> jax.Array:
    """`gain * normed(z) + shift` for z [B, H, C, d]."""
    return learned.gain[:, None] * normalized(z, _EPSILON)[0] + learned.shift[:, None]


def _slope(learned: Learned, z: jax.Array, target: jax.Array) -> jax.Array:
    """The gradient of `1/2 |norm(z) - target|^2` for z."""
    y, deviation = normalized(z, _EPSILON)
    gain = learned.gain[:, None]
    error = gain * (gain * y + learned.shift[:, None] - target)
    return (error - error.mean(-1, keepdims=True) - y * (error * y).mean(-1, keepdims=True)) / deviation


def _after(learned: Learned, start: Affine, steps: Affine, last_B: jax.Array) -> TTTState:
    """The state behind place `last_B` of documents, its mini-batch closed where it was the last."""
    C = len(learned.tau)
    closed = jax.tree.map(lambda w, s: w - learned.tau[-1] * s, start, steps)
    ends = last_B % C == C - 1
    start = choose_rows(ends, closed, start)
    return TTTState(start, choose_rows(ends, jax.tree.map(jnp.zeros_like, steps), steps), last_B + 1)


def _chunk_step(
    learned: Learned, state: TTTState, inputs: tuple, slots: ChunkStep, *, aligned: bool
) -> tuple[TTTState, jax.Array]:
    """One chunk step: positions of one mini-batch, or first mini-batches of documents that begin in it.

    Args:
      inputs: q, k, v [B, C, H, d], rate [B, C, H].
      aligned: whether it is known that the step begins with a mini-batch.
    """
    q, k, v, rate = (jnp.swapaxes(x, 1, 2) for x in inputs)
    begun = choose_rows(slots.fresh_B, learned.begin(1), state)
    start, steps = begun.start, begun.steps
    g = _slope(learned, start(k), v - k)
    written = jnp.where(slots.kept()[:, None], rate, 0)[..., None] * g
    seen = slots.seen()[:, None]
    pairs = jnp.where(seen, q @ jnp.swapaxes(k, -1, -2) + 1, 0)  # the 1 is of the bias
    change = pairs @ written
    if not aligned:
        change += steps(q)
    tau = learned.tau[slots.position_BC % len(learned.tau)]
    y = q + _norm(learned, start(q) - tau[:, None, :, None] * change)

    of_last = jnp.where(slots.at_last(seen)[..., None], written, 0)  # of the last slot's document
    steps = Affine(steps.weight + jnp.swapaxes(k, -1, -2) @ of_last, steps.bias + of_last.sum(2))
    last_B = jnp.take_along_axis(slots.position_BC, slots.last_B[:, None], axis=1)[:, 0]
    return choose_rows(slots.taken_B, _after(learned, start, steps, last_B), state), jnp.swapaxes(y, 1, 2)


def _widened(inputs: tuple) -> tuple:
    """In the dtype of the map."""
    dtype = jnp.promote_types(inputs[0].dtype, jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype), inputs)


def chunked(learned: Learned, state: TTTState | None, inputs: tuple, documents_BT: jax.Array | None):
    """Mini-batch by mini-batch, each in matrix products."""
    inputs, C = _widened(inputs), len(learned.tau)
    aligned = documents_BT is None
    body = lambda state, x, slots: _chunk_step(learned, state, x, slots, aligned=aligned)
    if aligned:
        return scan_aligned(body, learned.begin(len(inputs[0])), inputs, C)[::-1]
    state = learned.begin(len(inputs[0])) if state is None else state
    position_BT = positions_in_documents(documents_BT, state.position_B)
    return scan_chunk_steps(body, state, inputs, C, documents_BT, position_BT)[::-1]


def definition(learned: Learned, state: TTTState | None, inputs: tuple, documents_BT: jax.Array | None):
    """One position after another, the gradient by `jax.grad`."""
    inputs = _widened(inputs)
    state = learned.begin(len(inputs[0])) if state is None else state
    if documents_BT is None:
        documents_BT = jnp.ones(inputs[0].shape[:2], jnp.int32)
    new_BT = positions_in_documents(documents_BT, state.position_B) == 0

    def loss(weights: Affine, k: jax.Array, v: jax.Array) -> jax.Array:
        """Summed over rows and heads, each of which has weights of its own."""
        return 0.5 * jnp.sum((_norm(learned, weights(k)) - (v - k)) ** 2)

    def step(state: TTTState, x: tuple) -> tuple[TTTState, jax.Array]:
        (q, k, v, rate), new_B = x
        q, k, v = (y[..., None, :] for y in (q, k, v))
        state = choose_rows(new_B, learned.begin(1), state)
        slopes = jax.grad(loss)(state.start, k, v)
        over = lambda s: rate.reshape(*rate.shape, *[1] * (s.ndim - 2))
        steps = jax.tree.map(lambda total, s: total + over(s) * s, state.steps, slopes)
        tau_B = learned.tau[state.position_B % len(learned.tau)]
        at = lambda w, s: w - tau_B.reshape(-1, *[1] * (w.ndim - 1)) * s
        y = q + _norm(learned, jax.tree.map(at, state.start, steps)(q))
        return _after(learned, state.start, steps, state.position_B), y[..., 0, :]

    of_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, new_BT))
    state, y = jax.lax.scan(step, state, of_time)
    return jnp.moveaxis(y, 0, 1), state


def _over_devices(chosen: Implementation, exchange: SequenceParallel, learned, state, inputs, documents):
    """What the map learns does not add up: its state is handed over from device to device."""
    documents = jnp.ones(inputs[0].shape[:2], jnp.int32) if documents is None else documents
    state = learned.begin(len(inputs[0])) if state is None else state
    step = lambda state, x: chosen.run(learned, state, *x)[::-1]
    return exchange.hand_over(step, state, (inputs, exchange.local_documents(documents)))[::-1]


@dataclasses.dataclass(frozen=True)
class TTTSpec:
    """The static facts by which an implementation is chosen."""

    batch: int
    positions: int
    heads: int
    width: int
    mini_batch: int
    dtype: str
    packed: bool

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width} C{self.mini_batch}"
        return " ".join([shape, self.dtype, *(["packed"] if self.packed else [])])

    @classmethod
    def of(cls, exchange: SequenceParallel | None, learned, state, inputs, documents) -> TTTSpec:
        """Of the arrays of a device; where positions are split over several, of one row at a time."""
        q, alone = inputs[0], exchange is None
        batch = q.shape[0] if alone else 1
        return cls(batch, *q.shape[1:], len(learned.tau), str(q.dtype), documents is not None or not alone)


TTT_LINEAR = Op(
    "ttt_linear",
    TTTSpec.of,
    {"definition": Implementation(definition), "chunked": Implementation(chunked)},
    preference=("chunked",),
    split=_over_devices,
)


def ttt_linear(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHd: jax.Array,
    rate_BTH: jax.Array,
    learned: Learned,
    *,
    documents_BT: jax.Array | None = None,
    state: TTTState | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, TTTState]:
    """Trains the map on the keys and values, position by position, and reads it with the queries.

    Args:
      q_BTHd, k_BTHd, v_BTHd: queries, keys and values.
      rate_BTH: step sizes.
      learned: where every document begins, the norm, and tau, whose length is that of a mini-batch.
      documents_BT: of `attnlab.ops.documents.document_index`; None: every row is one document.
      state: after the positions before, where they are of document 0; None: there are none.
      impl: "definition": one position after another, the inner gradient by `jax.grad`; "chunked": in matrix products
        over mini-batches, exact; "auto".

    Returns:
      y_BTHd and the state after the last position, both in float32 (float64 where q is): all of it is computed there.

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    B, T, H, d = q_BTHd.shape
    for name, x, shape in (
        ("k_BTHd", k_BTHd, (B, T, H, d)),
        ("v_BTHd", v_BTHd, (B, T, H, d)),
        ("rate_BTH", rate_BTH, (B, T, H)),
        ("learned.first.weight", learned.first.weight, (H, d, d)),
        ("learned.first.bias", learned.first.bias, (H, d)),
    ):
        if x.shape != shape:
            raise UserError(f"ttt_linear: {name} {x.shape}; expected {shape}, as q is {q_BTHd.shape}")
    if state is not None and documents_BT is None:
        raise UserError("ttt_linear: a state is given, but not which positions continue its document")
    rows, heads, states = ("batch", "seq", "heads", None), ("heads", None, None), ("batch", "heads", None, None)
    axes_of_state = TTTState(Affine(states, states[:3]), Affine(states, states[:3]), states[:1])
    axes_of_learned = Learned(Affine(heads, heads[:2]), heads[:2], heads[:2], (None,))
    inputs = (q_BTHd, k_BTHd, v_BTHd, rate_BTH)
    return TTT_LINEAR(
        learned, state, inputs, documents_BT,
        axes=(axes_of_learned, None if state is None else axes_of_state, (rows, rows, rows, rows[:3]), rows[:2]),
        out_axes=[rows, states, states[:3], states, states[:3], states[:1]], impl=impl,
    )  # fmt: skip


def flops_per_token(length: int, mini_batch: int, width: int) -> float:
    """FLOPs of the matrix products of `chunked` per position and head, on one unpadded document, all pairs counted."""
    C = min(mini_batch, length)
    padded = -(-length // C) * C / length
    return padded * (6.0 * width * width + 4.0 * C * width)
