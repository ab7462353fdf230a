"""The gated delta rule: a linear memory that decays, and that corrects what it holds at a key before it writes there.

With `a_t = exp(log_decay_t)`, for every head

    S_t = S_{t-1} A_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,      o_t = S_t q_t,

where `A_t` is the number `a_t`, or diagonal with a decay for each channel of the keys.

Source: Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464, section 3; without
decay it is the delta rule of Schlag et al. 2021, arXiv:2102.11174, in parallel form of Yang et al. 2024,
arXiv:2406.06484; with decays of channels it is Kimi Delta Attention, Kimi Team 2025, arXiv:2510.26692. States here are
transposed, [d, e], so that keys index rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import delta_kernel
from attnlab.ops.channel_decay import decayed_products, products_flops
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.position_decay import decays_between
from attnlab.parallel.sequence_parallel import SequenceParallel

_BASE = 8  # triangular blocks of this size are inverted by a power series, larger ones from their quarters


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `delta_rule`."""

    batch: int
    positions: int
    heads: int
    width: int
    value_width: int
    dtype: str
    chunk: int
    packed: bool
    channels: bool = False  # whether each has a decay of its own

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}/{self.value_width} C{self.chunk}"
        return " ".join([shape, self.dtype, *(name for name in ("packed", "channels") if getattr(self, name))])

    @classmethod
    def of(
        cls, exchange: SequenceParallel | None, q, k, v, log_decay, beta, documents, state, *, chunk: int
    ) -> DeltaSpec:
        """Of the arrays of a device; where positions are split over several, d more value columns, in wide sums."""
        d, e, dtype = q.shape[3], v.shape[3], v.dtype
        if exchange is not None:
            e, dtype = e + d, jnp.promote_types(dtype, jnp.float32)
        return cls(*q.shape, e, str(dtype), chunk, documents is not None, log_decay.ndim == 4)


def _widened(q, k, v, log_decay, beta, documents, state) -> tuple[Any, ...]:
    """In the dtype of sums; where there is no state it is zero."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype)
    return *(x.astype(dtype) for x in (q, k, v, log_decay, beta)), documents, state.astype(dtype)


def _in_wide_sums(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays in the dtype of sums, its output in that of v."""

    @functools.wraps(run)
    def wide(q, k, v, *rest, chunk: int):
        o, state = run(*_widened(q, k, v, *rest), chunk=chunk)
        return o.astype(v.dtype), state

    return wide


@_in_wide_sums
def definition(q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH, documents_BT, state_BHde, *, chunk):
    """The recurrence, position by position; `chunk` plays no part."""
    same_BT = jnp.ones(q_BTHd.shape[:2], bool)
    if documents_BT is not None:
        same_BT = documents_BT == jnp.pad(documents_BT, ((0, 0), (1, 0)))[:, :-1]

    def step(state, inputs):
        return _step(state, *inputs)

    by_time = [jnp.moveaxis(x, 1, 0) for x in (q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH, same_BT)]
    state, o = jax.lax.scan(step, state_BHde, tuple(by_time))
    return jnp.moveaxis(o, 0, 1), state


@_in_wide_sums
def chunked(q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH, documents_BT, state_BHde, *, chunk):
    """Chunks of up to `chunk` positions by matrix products, the state carried from one to the next.

    Inside a chunk the rule writes `M_t = a_t M_{t-1} + k_t u_t^T` with `u_t = beta_t (v_t - a_t M_{t-1}^T k_t)`: a unit
    triangular system in the u, whose inverse (the WY or UT transform) does not depend on the state. All that does not
    is computed for all chunks at once. Decays enter as exp of sums of 0 or less, never as quotients.
    """
    B, T, H, d = q_BTHd.shape
    if T == 1:
        same_B = None if documents_BT is None else documents_BT[:, 0] == 0
        inputs = (x[:, 0] for x in (q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH))
        state, o = _step(state_BHde, *inputs, same_B)
        return o[:, None], state
    C = min(chunk, T)
    # Rows and heads are one axis, G: beside an axis of size 1 (a batch of one row) XLA on CPU is slow at sums. Padded
    # positions write nothing and let nothing decay; they are of the last document, whose state is kept.
    q, k, v, log_decay, beta = (_in_chunks(x, C) for x in (q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH))
    seen = jnp.tril(jnp.ones((C, C), bool))
    follows = True  # whether a position's document began before the chunk
    if documents_BT is not None:
        documents = jnp.pad(documents_BT, ((0, 0), (0, -T % C)), mode="edge")
        documents = jnp.repeat(jnp.moveaxis(documents.reshape(B, -1, C), 1, 0), H, axis=1)
        seen &= documents[..., :, None] == documents[..., None, :]
        last = documents[..., -1:]
        follows = documents == jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])

    # N chunks: pairs [N, G, C, C], positions [N, G, C, 1 or d], what the whole chunk keeps [N, G, 1 or d, 1].
    weigh = _by_channel if log_decay.ndim == q.ndim else _by_position
    q_weights, overlap, from_state, to_state = weigh(q, k, log_decay, seen)
    from_state = jnp.where(follows if follows is True else follows[..., None], from_state, 0)
    kept = from_state[..., -1, :, None]
    inverse = invert_unit_triangular(jnp.tril(beta[..., None] * overlap, -1))
    written = inverse @ (jnp.concatenate([v, k * from_state], axis=-1) * beta[..., None])
    v_width = v.shape[-1]
    own, read = written[..., :v_width], written[..., v_width:]
    readers = jnp.concatenate([read, q * from_state], axis=-2)

    def carry_over(state, inputs):
        readers, own, k_end, kept = inputs
        seen = readers @ state
        u = own - seen[..., :C, :]
        return kept * state + jnp.swapaxes(k_end, -1, -2) @ u, (u, seen[..., C:, :])

    start = state_BHde.reshape(B * H, d, v_width)
    state, (u, o) = jax.lax.scan(carry_over, start, (readers, own, k * to_state, kept))
    o = (o + q_weights @ u).reshape(-1, B, H, C, v_width).transpose(1, 0, 3, 2, 4)
    return o.reshape(B, -1, H, v_width)[:, :T], state.reshape(state_BHde.shape)


def _by_position(q, k, log_decay, seen):
    """What passes of one decay a position: `q k^T` and `k k^T` of pairs, of the state before, in the state after."""
    total, decay = decays_between(log_decay, seen)
    products = jnp.concatenate([q, k], axis=-2) @ jnp.swapaxes(k, -1, -2)
    C = q.shape[-2]
    of_pairs = products[..., :C, :] * decay, products[..., C:, :] * decay
    return *of_pairs, jnp.exp(total)[..., None], decay[..., -1, :, None]


def _by_channel(q, k, log_decay, seen):
    """`_by_position` of a decay for each channel."""
    products, upto, behind = decayed_products(jnp.stack([q, k], axis=-3), k, log_decay)
    of_queries, of_keys = (jnp.where(seen, products[..., i, :, :], 0) for i in (0, 1))
    return of_queries, of_keys, jnp.exp(upto), jnp.where(seen[..., -1, :, None], jnp.exp(behind), 0)


def _over_devices(chosen: Implementation, exchange: SequenceParallel, *arrays: Any, chunk: int):
    """Each device its positions, between which the state is handed on: the rule is linear in it."""
    q, k, v, log_decay, beta, documents, state = _widened(*arrays)
    documents = None if documents is None else exchange.local_documents(documents)
    run = lambda v, start: chosen.run(q, k, v, log_decay, beta, documents, start, chunk=chunk)
    o, after = exchange.linear_scan(run, v, state)
    return o.astype(arrays[2].dtype), after


DELTA_RULE = Op(
    "delta_rule",
    DeltaSpec.of,
    {
        "definition": Implementation(definition),
        "chunked": Implementation(chunked),
        "pallas": Implementation(
            delta_kernel.run,
            delta_kernel.unsupported,
            delta_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=delta_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "chunked"),
    split=_over_devices,
)


def delta_rule(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    log_decay: jax.Array,
    beta_BTH: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    state_BHde: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule, each position reading after it wrote.

    Args:
      q_BTHd, k_BTHd: queries and keys; for `0 <= beta <= 2` the rule is stable where keys are of length 1 or less.
      v_BTHe: values.
      log_decay: logarithms of the decays, 0 or less, [B, T, H], or [B, T, H, d]: of each channel of keys and queries.
      beta_BTH: strengths of writing.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state_BHde: the state before the first position, of document 0; None: zero.
      chunk: most positions computed at once by "chunked"; the kernel has its own.
      impl: "auto", or a name in `DELTA_RULE.table`.

    Returns:
      o_BTHe in the dtype of v, and the state after the last position. All is computed in fp32, fp64 for fp64 inputs;
      of the kernel sums and states are, its products of numbers in the dtype of v.

    Raises:
      UserError: shapes do not fit, `chunk` is below 1, `impl` is unknown.
    """
    _check(q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH, chunk)
    wide, narrow = ("batch", "seq", "heads", None), ("batch", "seq", "heads")
    state_axes = ("batch", "heads", None, None)
    return DELTA_RULE(
        q_BTHd, k_BTHd, v_BTHe, log_decay, beta_BTH, documents_BT, state_BHde,
        axes=(wide, wide, wide, wide[: log_decay.ndim], narrow, ("batch", "seq"), state_axes),
        out_axes=[wide, state_axes], impl=impl, chunk=chunk,
    )  # fmt: skip


def chunked_flops(chunk: int, length: int, d: int, e: int, channels: bool = False) -> float:
    """FLOPs of the matrix products of "chunked" for one head and sequence, the filled-up last chunk counted whole;
    `channels`: of decays of each channel."""
    if length == 1:
        return 4.0 * d * e
    C = min(chunk, length)
    pairs = products_flops(2, C, d) if channels else 2 * (2 * C) * d * C
    a_chunk = pairs + 2 * C * C * (d + e) + 2 * (2 * C) * d * e + 2 * C * d * e + 2 * C * C * e
    return -(-length // C) * (a_chunk + inverse_flops(C))


@jax.custom_vjp
def invert_unit_triangular(lower: jax.Array) -> jax.Array:
    """`(I + lower)^-1` of strictly lower triangular matrices [..., C, C], by matrix products alone.

    Blocks on the diagonal are inverted by `(I - L)(I + L^2)(I + L^4)`, exact where L^8 = 0, then joined two by two. The
    backward takes two products with the inverse.
    """
    C = lower.shape[-1]
    size = _padded(C)
    padded = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, size - C)] * 2)
    return _invert(padded)[..., :C, :C]


def _invert_forward(lower):
    inverse = invert_unit_triangular(lower)
    return inverse, inverse


def _invert_backward(inverse, cotangent):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.matmul(transposed, cotangent @ transposed, precision="highest"),)


invert_unit_triangular.defvjp(_invert_forward, _invert_backward)


def _padded(C: int) -> int:
    """The least `_BASE * 2^n` that holds C."""
    return _BASE * 2 ** max(0, math.ceil(math.log2(C / _BASE)))


def _invert(lower):
    C = lower.shape[-1]
    product = lambda a, b: jnp.matmul(a, b, precision="highest")
    if C == _BASE:
        square = product(lower, lower)
        inverse = jnp.eye(C, dtype=lower.dtype) - lower
        inverse += product(inverse, square)
        return inverse + product(inverse, product(square, square))
    h = C // 2
    first, second = _invert(jnp.stack([lower[..., :h, :h], lower[..., h:, h:]]))
    below = -product(second, product(lower[..., h:, :h], first))
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, second], axis=-1)], axis=-2)


def inverse_flops(C: int) -> float:
    """FLOPs of `invert_unit_triangular` of one matrix."""
    size = _padded(C)
    flops, h = 4 * 2.0 * _BASE**3 * (size // _BASE), _BASE
    while h < size:
        flops += 2 * 2 * h**3 * (size // (2 * h))
        h *= 2
    return flops


def _step(state_BHde, q_BHd, k_BHd, v_BHe, log_decay, beta_BH, same_B):
    """One position: the new state and o_BHe. Where `same_B` is false a document begins; None: nowhere."""
    decay_BHd = jnp.exp(log_decay if log_decay.ndim == 3 else log_decay[..., None])  # d, or 1
    if same_B is not None:
        decay_BHd = jnp.where(same_B[:, None, None], decay_BHd, 0)
    state = decay_BHd[..., None] * state_BHde
    error = v_BHe - jnp.einsum("bhd,bhde->bhe", k_BHd, state)
    state += k_BHd[..., :, None] * (beta_BH[..., None] * error)[..., None, :]
    return state, jnp.einsum("bhd,bhde->bhe", q_BHd, state)


def _in_chunks(x_BTH, C: int):
    """[B, T, H, ...] to [N, B H, C, ...], filled up with zeros."""
    B, T, H, *rest = x_BTH.shape
    x = jnp.pad(x_BTH, [(0, 0), (0, -T % C)] + [(0, 0)] * (x_BTH.ndim - 2))
    x = jnp.moveaxis(x.reshape(B, -1, C, H, *rest), (1, 3), (0, 2))
    return x.reshape(-1, B * H, C, *rest)


def _check(q, k, v, log_decay, beta, chunk) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise UserError(
            f"delta_rule: q {q.shape}, k {k.shape}, v {v.shape} do not fit; expected q, k [B, T, H, d], v [B, T, H, e]"
        )
    if beta.shape != q.shape[:3]:
        raise UserError(f"delta_rule: beta {beta.shape}; expected [B, T, H] = {q.shape[:3]}")
    if log_decay.shape not in (q.shape[:3], q.shape):
        raise UserError(
            f"delta_rule: log_decay {log_decay.shape}; expected [B, T, H] = {q.shape[:3]}, or [B, T, H, d] = {q.shape}"
        )
    if chunk < 1:
        raise UserError(f"delta_rule: chunk = {chunk}; allowed: 1 or more")
