"""Mesa: at every position the ridge regression of the values so far on their keys, evaluated at the query.

    G_t = a_t G_{t-1} + beta_t k_t k_t^T,  S_t = a_t S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T (G_t + diag(ridge))^-1 q_t

Both sums are one linear recurrence, of the keys and of [k, v] beside each other. No G_t but those at chunks' starts is
formed: conjugate gradients for all positions at once need products `G_t p_t` alone, which are reads of the recurrence.
The backward pass solves one more system with the same matrices (implicit function theorem).

Source: von Oswald et al. 2025, MesaNet: Sequence Modeling by Locally Optimal Test-Time Training, arXiv:2506.05233.

Shapes: `B` batch, `T` positions, `H` heads, `d` key width, `e` value width, `N` chunks, `C` positions in a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops.conjugate_gradient import Solution, Solver, conjugate_gradient
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.linear_recurrence import chunk_states, chunk_weights, in_chunks, scaled
from attnlab.parallel.sequence_parallel import SequenceParallel


@dataclasses.dataclass(frozen=True)
class MesaSpec:
    """The static facts by which an implementation is chosen. Lengths and widths as in `mesa`."""

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
    def of(
        cls, exchange: SequenceParallel | None, q, k, v, log_decay, beta, ridge, documents, state, *, solver: Solver,
        chunk: int,
    ) -> MesaSpec:  # fmt: skip
        """Of the arrays of a device."""
        return cls(*q.shape, v.shape[3], str(q.dtype), chunk, documents is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solves:
    """How the positions' systems were solved. Without gradients.

    Attributes:
      residual_BTH: `|A x - q| / |q|`; 0 for a direct solve.
      iterations_BTH: iterations of the solver that changed x; 0 for a direct solve.
    """

    residual_BTH: jax.Array
    iterations_BTH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """The recurrence in chunks, to be read by any queries.

    Attributes:
      k, u: keys [B, H, N, C, d] and what they have written [B, H, N, C, f].
      pairs, read: of `attnlab.ops.linear_recurrence.Weights`.
      before: states at the starts of chunks, [B, H, N, d, f]; None where all are 0.
    """

    k: jax.Array
    u: jax.Array
    pairs: jax.Array
    read: jax.Array
    before: jax.Array | None

    def of_keys(self) -> _Sums:
        """The first d columns."""
        d = self.k.shape[-1]
        before = None if self.before is None else self.before[..., :d]
        return dataclasses.replace(self, u=self.u[..., :d], before=before)

    def of_values(self) -> _Sums:
        """The others."""
        d = self.k.shape[-1]
        before = None if self.before is None else self.before[..., d:]
        return dataclasses.replace(self, u=self.u[..., d:], before=before)

    def at(self, p: jax.Array) -> jax.Array:
        """What queries p [B, H, N, C, d] read, [B, H, N, C, f]."""
        scores = _einsum("bhncd,bhnsd->bhncs", p, self.k) * self.pairs
        o = _einsum("bhncs,bhnse->bhnce", scores, self.u)
        if self.before is not None:
            o += _einsum("bhncd,bhnde->bhnce", scaled(p, self.read), self.before)
        return o


_einsum = functools.partial(jnp.einsum, precision="highest")  # the solver sees small differences of large sums


def _widened(q, k, v, log_decay, beta, ridge, documents, state) -> tuple[Any, ...]:
    """In the dtype of sums, and [k, v] times their strength."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v, log_decay, beta, ridge = (x.astype(wide) for x in (q, k, v, log_decay, beta, ridge))
    log_decay = jnp.maximum(log_decay, jnp.log(jnp.finfo(wide).tiny))  # differences stay finite
    u = beta[..., None] * jnp.concatenate([k, v], axis=-1)
    return q, k, u, log_decay, ridge, documents, None if state is None else state.astype(wide)


def _sums(k, u, log_decay, documents, state, chunk: int) -> tuple[_Sums, jax.Array]:
    """The recurrence, and the state after the last position."""
    T = k.shape[1]
    C = min(chunk, T)
    k, u, log_decay = (in_chunks(x, C) for x in (k, u, log_decay))
    documents = None if documents is None else in_chunks(documents[..., None], C, mode="edge")
    weights = chunk_weights(log_decay, documents, T, C, k.dtype)
    written = _einsum("bhnsd,bhnse->bhnde", scaled(k, weights.write), u)
    before, after = chunk_states(written, weights.carry, state)
    return _Sums(k, u, weights.pairs, weights.read, before), after


def _image(sums: _Sums, ridge: jax.Array, p: jax.Array) -> jax.Array:
    """`(G_t + diag(ridge)) p_t`."""
    return sums.at(p) + ridge[:, None, None] * p


def _conjugate_gradients(solver: Solver, early_exit: bool, sums: _Sums, ridge: jax.Array, b: jax.Array) -> Solution:
    shape = b.shape
    return conjugate_gradient(
        lambda p: _image(sums, ridge, p.reshape(shape)).reshape(p.shape),
        b.reshape(-1, shape[-1]),
        iterations=solver.iterations,
        tolerance=solver.tolerance,
        early_exit=early_exit,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solved(solver: Solver, early_exit: bool, sums: _Sums, ridge: jax.Array, b: jax.Array):
    """x with `(G_t + diag(ridge)) x_t = b_t` [B, H, N, C, d]; residuals and iterations [B, H, N, C]."""
    solution = _conjugate_gradients(solver, early_exit, sums, ridge, b)
    rows = b.shape[:-1]
    return solution.x_Nd.reshape(b.shape), solution.residual_N.reshape(rows), solution.iterations_N.reshape(rows)


def _solved_forward(solver: Solver, early_exit: bool, sums: _Sums, ridge: jax.Array, b: jax.Array):
    out = _solved(solver, early_exit, sums, ridge, b)
    return out, (sums, ridge, out[0])


def _solved_backward(solver: Solver, early_exit: bool, residuals, cotangents):
    """With `A y = dx`: db = y, and dA = -y x^T, through the product with x."""
    sums, ridge, x = residuals
    y = _conjugate_gradients(solver, early_exit, sums, ridge, cotangents[0]).x_Nd.reshape(x.shape)
    _, of_matrix = jax.vjp(lambda sums, ridge: _image(sums, ridge, x), sums, ridge)
    return *of_matrix(-y), y


_solved.defvjp(_solved_forward, _solved_backward)


def by_conjugate_gradients(
    q, k, v, log_decay, beta, ridge, documents, state, *, solver: Solver, chunk: int, early_exit: bool
) -> tuple[jax.Array, Solves, jax.Array]:
    """In memory and time linear in T; `early_exit`: until all systems are solved to the solver's tolerance."""
    (B, T, H, _), dtype = q.shape, q.dtype
    q, k, u, log_decay, ridge, documents, state = _widened(q, k, v, log_decay, beta, ridge, documents, state)
    sums, after = _sums(k, u, log_decay, documents, state, chunk)
    x, *solves = _solved(solver, early_exit, sums.of_keys(), ridge, in_chunks(q, sums.k.shape[3]))
    rows = lambda y: jnp.moveaxis(y, 1, 3).reshape(B, -1, H, *y.shape[4:])[:, :T]
    o = rows(sums.of_values().at(x))
    return o.astype(dtype), Solves(*(jax.lax.stop_gradient(rows(y)) for y in solves)), after


def definition(
    q, k, v, log_decay, beta, ridge, documents, state, *, solver: Solver, chunk: int
) -> tuple[jax.Array, Solves, jax.Array]:
    """Position by position, every matrix formed and factored."""
    del solver, chunk
    (B, T, H, d), dtype = q.shape, q.dtype
    q, k, u, log_decay, ridge, documents, state = _widened(q, k, v, log_decay, beta, ridge, documents, state)
    same = jnp.ones((B, T), bool)
    if documents is not None:
        same = documents == jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1]

    def step(state, inputs):
        q, k, u, log_decay, same = inputs
        kept = jnp.where(same[:, None], jnp.exp(log_decay), 0)
        state = kept[..., None, None] * state + k[..., None] * u[..., None, :]
        matrix = state[..., :d] + ridge[..., None] * jnp.eye(d, dtype=ridge.dtype)
        x = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), q[..., None])[..., 0]
        return state, _einsum("bhd,bhde->bhe", x, state[..., d:])

    start = jnp.zeros((B, H, d, u.shape[3]), q.dtype) if state is None else state
    inputs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, u, log_decay, same))
    after, o = jax.lax.scan(step, start, inputs)
    none = jnp.zeros((B, T, H), q.dtype)
    return jnp.moveaxis(o, 0, 1).astype(dtype), Solves(none, none), after


def _over_devices(
    chosen: Implementation, exchange: SequenceParallel, *arrays: Any, solver: Solver, chunk: int
) -> tuple[jax.Array, Solves, jax.Array]:
    """The sums of the positions before are added up first; then each device solves its own."""
    *of_positions, documents, state = arrays
    documents = None if documents is None else exchange.local_documents(documents)
    _, k, u, log_decay, *_ = _widened(*of_positions, None, None)
    _, own = _sums(k, u, log_decay, documents, None, chunk)
    kept = jnp.exp(log_decay.sum(1))
    if documents is not None:
        kept = jnp.where((documents[:, -1] == 0)[:, None], kept, 0)
    start = jnp.zeros_like(own) if state is None else state.astype(own.dtype)
    join = lambda before, own: own[0][..., None, None] * before + own[1]
    before, after = exchange.exclusive_scan(join, (kept, own), start)
    o, solves, _ = chosen.run(*of_positions, documents, before, solver=solver, chunk=chunk)
    return o, solves, after


MESA = Op(
    "mesa",
    MesaSpec.of,
    {
        "definition": Implementation(definition),
        "cg": Implementation(functools.partial(by_conjugate_gradients, early_exit=True)),
        "cg_fixed": Implementation(functools.partial(by_conjugate_gradients, early_exit=False)),
    },
    preference=("cg",),
    split=_over_devices,
)


def mesa(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHe: jax.Array,
    log_decay_BTH: jax.Array,
    beta_BTH: jax.Array,
    ridge_Hd: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    state_BHdf: jax.Array | None = None,
    iterations: int = 30,
    tolerance: float | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[jax.Array, Solves, jax.Array]:
    """`o_t = S_t^T (G_t + diag(ridge))^-1 q_t` of the sums G of `beta k k^T` and S of `beta k v^T`, both decaying.

    Args:
      q_BTHd, k_BTHd, v_BTHe: queries, keys and values; keys of length about 1. There is no scale.
      log_decay_BTH: at most 0; a decay below the smallest normal number counts as that number.
      beta_BTH: strengths of writes, 0 or more.
      ridge_Hd: above 0.
      documents_BT: of `attnlab.ops.documents.document_index`; None: all positions continue one document.
      state_BHdf: [G, S] before the first position, f = d + e, read by document 0 only; None: nothing.
      iterations: of conjugate gradients, at most; gradients are those of the exact solution, wrong by about the
        residual. `definition` reads neither these nor `tolerance`.
      tolerance: relative residual at which a system is done; None: 1e-5, in float64 1e-13.
      chunk: positions computed at once, changes only time and memory.
      impl: "auto" (cg); "definition": every matrix formed and factored; "cg": until all systems are done; "cg_fixed":
        always `iterations`, a number known before the run.

    Returns:
      o_BTHe in the dtype of q, how the systems were solved, and the state after the last position in fp32 (fp64 for
      fp64 inputs), in which all sums and the solver are.

    Raises:
      UserError: shapes that do not fit, or an unknown `impl`.
    """
    B, T, H, d = q_BTHd.shape
    f = d + v_BTHe.shape[-1]
    for name, x, shape in (
        ("k_BTHd", k_BTHd, (B, T, H, d)),
        ("v_BTHe", v_BTHe, (B, T, H, v_BTHe.shape[-1])),
        ("log_decay_BTH", log_decay_BTH, (B, T, H)),
        ("beta_BTH", beta_BTH, (B, T, H)),
        ("ridge_Hd", ridge_Hd, (H, d)),
        ("documents_BT", documents_BT, (B, T)),
        ("state_BHdf", state_BHdf, (B, H, d, f)),
    ):
        if x is not None and x.shape != shape:
            raise UserError(f"mesa: {name} {x.shape}; expected {shape}, as q is {q_BTHd.shape}")
    for name, count in (("iterations", iterations), ("chunk", chunk)):
        if count < 1:
            raise UserError(f"mesa: {name}={count} is not allowed; allowed: 1 or more")
    rows, states = ("batch", "seq", "heads", None), ("batch", "heads", None, None)
    return MESA(
        q_BTHd, k_BTHd, v_BTHe, log_decay_BTH, beta_BTH, ridge_Hd, documents_BT, state_BHdf,
        axes=(rows, rows, rows, rows[:3], rows[:3], ("heads", None), rows[:2], states),
        out_axes=[rows, rows[:3], rows[:3], states], impl=impl, chunk=chunk,
        solver=Solver(iterations, iterations, tolerance),
    )  # fmt: skip


def flops_per_token(length: int, chunk: int, width: int, value_width: int, iterations: int) -> float:
    """FLOPs of the matrix products of `cg_fixed` per position and head, all pairs of a chunk counted."""
    C = min(chunk, length)
    chunks = -(-length // C)
    read = lambda e: 2.0 * C * (width + e) + (2.0 * width * e if chunks > 1 else 0)
    written = 2.0 * width * (width + value_width)
    return (written + iterations * read(width) + read(value_width)) * chunks * C / length
