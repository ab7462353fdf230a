"""A linear recurrence whose transitions are diagonal plus low rank: what stands along one vector goes over to another.

`S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T r_t` for every head: what is read along
a_t is that of the state before its decay. With a = -k, b = beta k and g = 0 it is the delta rule.

Chunkwise as `attnlab.ops.delta_rule`: what `a_t` reads of its own chunk is a unit triangular system.
Source: Peng et al. 2025, RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv:2503.14456.

Shapes: `B` batch, `T` positions, `H` heads, `d` key width, `e` value width, `C` positions in a chunk, `N` chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.channel_decay import decayed_products, products_flops
from attnlab.ops.delta_rule import inverse_flops, invert_unit_triangular
from attnlab.ops.dispatch import Implementation, Op
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class DPLRSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `dplr`."""

    batch: int
    positions: int
    heads: int
    width: int
    value_width: int
    dtype: str
    chunk: int
    packed: bool

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.positions} H{self.heads} d{self.width}/{self.value_width} C{self.chunk}"
        return " ".join([shape, self.dtype, *(["packed"] if self.packed else [])])

    @classmethod
    def of(cls, exchange: SequenceParallel | None, r, k, v, log_decay, a, b, documents, state, *, chunk: int):
        """Of the arrays of a device; where positions are split over several, d more value columns."""
        e = v.shape[3] + (0 if exchange is None else k.shape[3])
        return cls(*r.shape, e, str(v.dtype), chunk, documents is not None)


def _widened(r, k, v, log_decay, a, b, documents, state) -> tuple[Any, ...]:
    """In the dtype of sums; where there is no state it is zero."""
    wide = jnp.promote_types(v.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), wide)
    return *(x.astype(wide) for x in (r, k, v, log_decay, a, b)), documents, state.astype(wide)


def _in_wide_sums(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays in the dtype of sums, its output in that of v."""

    @functools.wraps(run)
    def wide(r, k, v, *rest, chunk: int):
        o, state = run(*_widened(r, k, v, *rest), chunk=chunk)
        return o.astype(v.dtype), state

    return wide


def _step(state_BHde, r, k, v, log_decay, a, b, same_B):
    """One position: the new state and o_BHe. Where `same_B` is false a document begins."""
    state = jnp.where(same_B[:, None, None, None], state_BHde, 0)
    seen = jnp.einsum("bhd,bhde->bhe", a, state, precision="highest")
    state = jnp.exp(log_decay)[..., None] * state + b[..., None] * seen[..., None, :] + k[..., None] * v[..., None, :]
    return state, jnp.einsum("bhd,bhde->bhe", r, state, precision="highest")


@_in_wide_sums
def definition(r, k, v, log_decay, a, b, documents, state, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The recurrence, position by position; `chunk` plays no part."""
    same = jnp.ones(r.shape[:2], bool)
    if documents is not None:
        same = documents == jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]
    by_time = tuple(jnp.moveaxis(x, 1, 0) for x in (r, k, v, log_decay, a, b, same))
    state, o = jax.lax.scan(lambda state, inputs: _step(state, *inputs), state, by_time)
    return jnp.moveaxis(o, 0, 1), state


@_in_wide_sums
def chunked(r, k, v, log_decay, a, b, documents, state, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Chunks of up to `chunk` positions by matrix products, the state carried from one to the next.

    Inside a chunk `u_t = a_t^T S_{t-1}` obeys a unit triangular system, whose inverse does not depend on the state. All
    that does not is computed for all chunks at once. Decays enter as exp of sums of 0 or less.
    """
    B, T, H, e = v.shape
    if T == 1:
        same_B = jnp.ones((B,), bool) if documents is None else documents[:, 0] == 0
        state, o = _step(state, *(x[:, 0] for x in (r, k, v, log_decay, a, b)), same_B)
        return o[:, None], state
    C = min(chunk, T)
    r, k, v, log_decay, a, b = (_in_chunks(x, C) for x in (r, k, v, log_decay, a, b))
    seen, follows = jnp.tril(jnp.ones((C, C), bool)), True
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, -T % C)), mode="edge")
        documents = jnp.repeat(jnp.moveaxis(documents.reshape(B, -1, C), 1, 0), H, axis=1)
        seen &= documents[..., :, None] == documents[..., None, :]
        last = documents[..., -1:]
        follows = (documents == jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]]))[..., None]

    # a_t reads what position t - 1 left: its products are those of a row one position earlier.
    earlier = lambda x: jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)
    later = lambda x: jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2)
    rows, keys = jnp.stack([earlier(a), r], axis=-3)[..., None, :, :, :], jnp.stack([k, b], axis=-3)
    products, upto, behind = decayed_products(rows, keys, log_decay[..., None, :, :])
    upto, behind = upto[..., 0, :, :], behind[..., 0, :, :]
    (a_k, a_b), (r_k, r_b) = (
        [jnp.where(seen, move(products[..., n, m, :, :]), 0) for n in (0, 1)]
        for m, move in enumerate((later, lambda x: x))
    )
    from_state = jnp.where(follows, jnp.exp(upto), 0)
    a_from, r_from = a * jnp.where(follows, jnp.exp(later(upto)), 0), r * from_state
    to_state = jnp.where(seen[..., -1, :, None], jnp.exp(behind), 0)
    inverse = invert_unit_triangular(-a_b)
    solved = inverse @ jnp.concatenate([a_k @ v, a_from], axis=-1)
    own, reads = solved[..., :e], jnp.concatenate([solved[..., e:], r_from], axis=-2)
    written = jnp.swapaxes(k * to_state, -1, -2) @ v

    def carry_over(state, inputs):
        reads, own, b_end, written, kept = inputs
        seen = reads @ state
        u = own + seen[..., :C, :]
        return kept * state + written + jnp.swapaxes(b_end, -1, -2) @ u, (u, seen[..., C:, :])

    inputs = reads, own, b * to_state, written, from_state[..., -1, :, None]
    state, (u, o) = jax.lax.scan(carry_over, state.reshape(B * H, -1, e), inputs)
    o = (o + r_k @ v + r_b @ u).reshape(-1, B, H, C, e).transpose(1, 0, 3, 2, 4)
    return o.reshape(B, -1, H, e)[:, :T], state.reshape(B, H, -1, e)


def _in_chunks(x_BTHw: jax.Array, C: int) -> jax.Array:
    """[N, B H, C, w], zeros behind the end: they write nothing and let nothing decay."""
    B, T, H, w = x_BTHw.shape
    x = jnp.pad(x_BTHw, ((0, 0), (0, -T % C), (0, 0), (0, 0))).reshape(B, -1, C, H, w)
    return jnp.moveaxis(x, (1, 3), (0, 2)).reshape(-1, B * H, C, w)


def chunked_flops(chunk: int, length: int, d: int, e: int) -> float:
    """FLOPs of the matrix products of "chunked" for one head and sequence, the filled-up last chunk counted whole."""
    if length == 1:
        return 4.0 * d * e
    C = min(chunk, length)
    inside = 2 * products_flops(2, C, d) + inverse_flops(C) + 2 * C * C * e + 2 * C * C * (d + e) + 2 * 2 * C * C * e
    return -(-length // C) * (inside + 2 * (2 * C) * d * e + 2 * 2 * C * d * e)


def _over_devices(chosen: Implementation, exchange: SequenceParallel, *arrays: Any, chunk: int):
    """Each device its positions, between which the state is handed on: the rule is linear in it."""
    r, k, v, log_decay, a, b, documents, state = _widened(*arrays)
    documents = None if documents is None else exchange.local_documents(documents)
    run = lambda v, start: chosen.run(r, k, v, log_decay, a, b, documents, start, chunk=chunk)
    o, after = exchange.linear_scan(run, v, state)
    return o.astype(arrays[2].dtype), after


DPLR = Op(
    "dplr",
    DPLRSpec.of,
    {"definition": Implementation(definition), "chunked": Implementation(chunked)},
    preference=("chunked",),
    split=_over_devices,
)


def dplr(
    r_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    log_decay_BTHd: jax.Array,
    a_BTHd: jax.Array,
    b_BTHd: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    state_BHde: jax.Array | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T r_t`.

    Args:
      r_BTHd, k_BTHd, v_BTHe: what reads, keys and values; there is no scale.
      log_decay_BTHd: g, 0 or less.
      a_BTHd, b_BTHd: along what the state before the decay is read, and along what that is written.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state_BHde: the state before the first position, of document 0; None: zero.
      chunk: most positions computed at once by "chunked".
      impl: "auto", or a name in `DPLR.table`.

    Returns:
      o_BTHe in the dtype of v, and the state after the last position. All is computed in fp32, fp64 for fp64 inputs.

    Raises:
      UserError: shapes do not fit, `chunk` is below 1, `impl` is unknown.
    """
    shapes = [x.shape for x in (r_BTHd, k_BTHd, log_decay_BTHd, a_BTHd, b_BTHd)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4 or v_BTHe.shape[:3] != shapes[0][:3] or v_BTHe.ndim != 4:
        raise UserError(
            f"dplr: r, k, log_decay, a, b {', '.join(map(str, shapes))} and v {v_BTHe.shape} do not fit; expected "
            "[B, T, H, d] five times and [B, T, H, e]"
        )
    if chunk < 1:
        raise UserError(f"dplr: chunk={chunk} is not allowed; allowed: 1 or more")
    rows, states = ("batch", "seq", "heads", None), ("batch", "heads", None, None)
    return DPLR(
        r_BTHd, k_BTHd, v_BTHe, log_decay_BTHd, a_BTHd, b_BTHd, documents_BT, state_BHde,
        axes=(*[rows] * 6, rows[:2], states), out_axes=[rows, states], impl=impl, chunk=chunk,
    )  # fmt: skip
