"""Neural memory: a small network per head that is trained by gradient descent along the sequence, and read.

The memory M_W with layers W^1 .. W^L is trained on `1/2 |M_W(k_t) - v_t|^2`:

    S_t = eta_t S_{t-1} - theta_t grad(W_{t'}; k_t, v_t)        W_t = keep_t W_{t-1} + S_t        y_t = M_{W_t}(q_t)

where t' is the last step of the chunk before: steps of a chunk, counted from the document's beginning, take their
gradients at the same weights, and so can be taken at once.

Source: Behrouz et al. 2025, Titans, arXiv:2501.00663, eq. 8 to 15 and section 3.2.

Shapes: B batch, T positions, C chunk, H heads, d width of a head, i and o widths of a layer's input and output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.ops import memory_kernel
from attnlab.ops.chunk_steps import choose_rows, scan_aligned, scan_chunk_steps
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.documents import positions_in_documents
from attnlab.ops.memory_frame import MemorySpec, MemoryState, NeuralMemorySpec, chunk_step, forward
from attnlab.parallel import partition
from attnlab.parallel.sequence_parallel import SequenceParallel


def _widened(inputs: tuple) -> tuple:
    """In the dtype of the memory."""
    dtype = jnp.promote_types(inputs[0].dtype, jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype), inputs)


def chunked(initial, state, inputs, documents_BT, *, memory: MemorySpec, begins: bool = False):
    """In matrix products over chunks."""
    del begins  # the state is what it says
    inputs = _widened(inputs)
    # On CPU plain matrix products are many times faster than batched ones.
    one_by_one = partition.platform() == "cpu" and inputs[0].shape[1] > 1
    state, y = (_one_by_one if one_by_one else _together)(memory, initial, state, inputs, documents_BT)
    return y, state


def _one_by_one(spec, initial, state, inputs, documents_BT):
    """`_together` for one head of one row after the other."""
    B, T, H, _ = inputs[0].shape
    rows = lambda x: jnp.broadcast_to(x, (B, *x.shape[1:]))

    def flat(x):  # [B H, ...], each with rows and heads of its own
        return x.reshape(B * H, 1, 1, *x.shape[2:])

    def states(state):
        heads = jax.tree.map(lambda x: flat(rows(x)), (state.weights, state.momentum, state.start))
        return MemoryState(*heads, flat(rows(state.log_keep_BH)), jnp.repeat(rows(state.position_B), H)[:, None])

    def of_head(x):
        return _together(spec, *x)

    inputs = jax.tree.map(lambda x: jnp.swapaxes(flat(jnp.swapaxes(x, 1, 2)), 2, 3), inputs)  # [B H, 1, T, 1, ...]
    documents = None if documents_BT is None else jnp.repeat(documents_BT, H, axis=0)[:, None]
    after, y = jax.lax.map(of_head, (states(initial), states(state), inputs, documents))
    whole = lambda x: x.reshape(B, H, *x.shape[3:])
    weights, momentum, start = jax.tree.map(whole, (after.weights, after.momentum, after.start))
    after = MemoryState(weights, momentum, start, whole(after.log_keep_BH), after.position_B.reshape(B, H)[:, 0])
    return after, jnp.swapaxes(y.reshape(B, H, T, -1), 1, 2)


def _together(spec, initial, state, inputs, documents_BT):
    body = lambda state, inputs, slots: chunk_step(spec, initial, state, inputs, slots)
    if documents_BT is None:
        return scan_aligned(body, state, inputs, spec.chunk)
    position_BT = positions_in_documents(documents_BT, state.position_B)
    return scan_chunk_steps(body, state, inputs, spec.chunk, documents_BT, position_BT)


def definition_step(
    spec: MemorySpec, initial: MemoryState, state: MemoryState, inputs: tuple, new_B: jax.Array
) -> tuple[MemoryState, jax.Array]:
    """One position, as the recurrence says it; inputs as in `chunk_step` without C, `new_B` where a document begins."""
    q, k, v, log_keep, log_eta, theta = inputs
    state = state.restarted(initial, new_B)
    begins_B = state.position_B % spec.chunk == 0
    start = choose_rows(begins_B, state.weights, state.start)
    keep = jnp.ones_like(theta) if log_keep is None else jnp.exp(log_keep)
    log_kept = jnp.where(begins_B[:, None], 0, state.log_keep_BH) + jnp.log(keep)
    wide = lambda x: x[..., None, None]
    at = tuple(wide(jnp.exp(log_kept)) * w for w in start) if spec.grad_at == "decayed" else start

    def loss(weights, k, v):
        return 0.5 * jnp.sum((forward(spec, weights, k) - v) ** 2)

    slopes = jax.vmap(jax.vmap(jax.grad(loss)))(at, k, v)
    steps = [rate * wide(theta) * slope for rate, slope in zip(spec.rates, slopes)]
    surprise = [-step for step in steps]
    if log_eta is not None:
        surprise = [wide(jnp.exp(log_eta)) * s + new for s, new in zip(state.momentum, surprise)]
    weights = tuple(wide(keep) * w + s for w, s in zip(state.weights, surprise))
    read = weights if spec.read_after_write else state.weights
    y = forward(spec, read, q[..., None, :])[..., 0, :]
    momentum = tuple(surprise) if log_eta is not None else ()
    return MemoryState(weights, momentum, start, log_kept, state.position_B + 1), y


def definition(initial, state, inputs, documents_BT, *, memory: MemorySpec, begins: bool = False):
    """One position after another."""
    del begins
    inputs = _widened(inputs)
    if documents_BT is None:
        documents_BT = jnp.ones(jax.tree.leaves(inputs)[0].shape[:2], jnp.int32)
    new_BT = positions_in_documents(documents_BT, state.position_B) == 0

    def step(state, x):
        return definition_step(memory, initial, state, *x)

    state, y_TBHd = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, new_BT)))
    return jnp.moveaxis(y_TBHd, 0, 1), state


def _over_devices(
    chosen: Implementation,
    exchange: SequenceParallel,
    initial,
    state,
    inputs,
    documents,
    *,
    memory: MemorySpec,
    begins: bool,
):
    """What the memory learns does not add up: its state is handed over from device to device."""
    del begins  # of the first device alone
    documents = jnp.ones(inputs[0].shape[:2], jnp.int32) if documents is None else documents
    step = lambda state, x: chosen.run(initial, state, *x, memory=memory)[::-1]
    return exchange.hand_over(step, state, (inputs, exchange.local_documents(documents)))[::-1]


NEURAL_MEMORY = Op(
    "neural_memory",
    NeuralMemorySpec.of,
    {
        "definition": Implementation(definition),
        "chunked": Implementation(chunked),
        "pallas": Implementation(
            memory_kernel.run,
            supports=memory_kernel.unsupported,
            worth=memory_kernel.worth,
            platforms=("tpu", "gpu"),
            interpretable=True,
            kernel_flops=memory_kernel.kernel_flops,
        ),
    },
    preference=("pallas", "chunked"),
    split=_over_devices,
)


def neural_memory(
    q_BTHd: jax.Array,
    k_BTHd: jax.Array,
    v_BTHd: jax.Array,
    log_keep_BTH: jax.Array | None,
    log_eta_BTH: jax.Array | None,
    theta_BTH: jax.Array,
    initial: MemoryState,
    spec: MemorySpec,
    *,
    documents_BT: jax.Array | None = None,
    state: MemoryState | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, MemoryState]:
    """Trains the memory on the keys and values, position by position, and reads it with the queries.

    Args:
      q_BTHd, k_BTHd, v_BTHd: queries, keys (of length at most about 1) and values.
      log_keep_BTH: log(1 - alpha), what is not forgotten; None: nothing is.
      log_eta_BTH: log of what remains of the momentum; None: no momentum.
      theta_BTH: step size.
      initial: where every document begins, with rows [1, ...], and `position_B` 0; see `initial_state`. Rows [B, ...]
        are taken, too, where positions are not split over devices.
      spec: what the memory is.
      documents_BT: of `attnlab.ops.documents.document_index`; None: every row is one document.
      state: after the positions before, where they are of document 0; None: there are none.
      impl: "definition": one position after another, the inner gradient by `jax.grad`; "chunked": in matrix products
        over chunks, exact; "pallas": so on TPU and (bfloat16; a matrix, or two layers 64 wide) Hopper, in products of
        the dtype of q, with the weights in fast memory; "auto".

    Returns:
      y_BTHd and the state after the last position, both in float32 (float64 where q is): all of it is computed there.
      Reverse-mode differentiable in every array. Linear in T in memory: chunks are computed again in the backward pass.
    """
    inputs = (q_BTHd, k_BTHd, v_BTHd, log_keep_BTH, log_eta_BTH, theta_BTH)
    if state is not None and documents_BT is None:
        raise UserError("neural_memory: a state is given, but not which positions continue its document")
    begins = state is None
    if begins:
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (q_BTHd.shape[0], *x.shape[1:])), initial)
    rows = ("batch", "seq", "heads", None)
    of_state = lambda tree: jax.tree.map(lambda x: ("batch", "heads", None, None)[: x.ndim], tree)
    of_inputs = tuple(rows if x is None else rows[: x.ndim] for x in inputs)
    out_axes = [rows, *(("batch", "heads", None, None)[: x.ndim] for x in jax.tree.leaves(state))]
    return NEURAL_MEMORY(
        initial, state, inputs, documents_BT,
        axes=(of_state(initial), of_state(state), of_inputs, rows[:2]), out_axes=out_axes, impl=impl, memory=spec,
        begins=begins,
    )  # fmt: skip
