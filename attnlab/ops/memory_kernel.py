"""Neural memory by our Pallas kernels (`kernels_pallas.neural_memory`), for TPU and Hopper: W and S stay on chip."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import attention_flash
from attnlab.ops.chunk_steps import ChunkStep
from attnlab.ops.documents import positions_in_documents
from attnlab.ops.memory_frame import MemorySpec, MemoryState, NeuralMemorySpec, chunk_step
from attnlab.ops.two_stage import LOG_FLOOR
from attnlab.parallel import partition
from kernels_pallas import tuning

_WIDEST_ON_GPU = 64
_CHUNKS = 16  # the kernels' chunks are whole tiles of so many rows


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas."""
    from kernels_pallas import neural_memory

    return neural_memory


def unsupported(spec: NeuralMemorySpec) -> str | None:
    """Why the kernels cannot serve, or None."""
    memory = spec.memory
    if partition.platform() == "gpu":
        reason = _kernels().gpu_unsupported(spec.widths, memory.chunk, spec.dtype, memory.residual_norm)
        reason = reason or _other(spec)
        return reason or attention_flash.unsupported_heads(spec.dtype, spec.widths[0])
    reasons = (
        (spec.dtype not in ("bfloat16", "float32"), f"it computes bfloat16 and float32, not {spec.dtype}"),
        (memory.chunk % _CHUNKS != 0, f"chunk={memory.chunk}; allowed: multiples of {_CHUNKS}"),
    )
    if reason := next((reason for fails, reason in reasons if fails), _other(spec)):
        return reason
    with tuning.device_kind(partition.device_kind()):
        return _kernels().does_not_fit(spec.widths, memory.chunk, spec.dtype, spec.positions)


def _other(spec: NeuralMemorySpec) -> str | None:
    """What of the memory no kernel has, or None."""
    memory = spec.memory
    if memory.norm_scale:
        return "norm_scale=True; allowed: False"
    if len(spec.widths) > 2 and memory.activation != "gelu_tanh":
        return f"activation={memory.activation}; allowed: gelu_tanh"
    return None


def worth(spec: NeuralMemorySpec) -> bool:
    """Whether "auto" takes it: not for less than two chunks, which are taken at once, nor on GPUs for heads wider than
    64, of whose backward the tensor cores are serialized."""
    if partition.platform() == "gpu" and spec.widths[0] > _WIDEST_ON_GPU:
        return False
    return spec.positions >= 2 * spec.memory.chunk


def kernel_flops(spec: NeuralMemorySpec) -> dict[str, float]:
    """FLOPs of one run of each kernel, all pairs of a group of chunks counted."""
    if partition.platform() == "gpu":
        size = spec.batch * spec.positions * spec.heads
        return _kernels().gpu_kernel_flops(size, spec.widths, spec.memory.chunk, spec.memory.residual_norm)
    with tuning.device_kind(partition.device_kind()):
        shape = spec.batch, spec.positions, spec.heads, spec.widths, spec.dtype
        return _kernels().kernel_flops(*shape, spec.memory.chunk)


def run(
    initial: MemoryState,
    state: MemoryState,
    inputs: tuple,
    documents_BT: jax.Array | None,
    *,
    memory: MemorySpec,
    begins: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, MemoryState]:
    """See `attnlab.ops.neural_memory.neural_memory`. Products are in the dtype of q; `interpret` runs the kernels as
    plain XLA, on any platform.

    `begins`: every row begins with a document, so that `state` is not read. Else a row may begin inside a chunk, whose
    rest is then taken before, by XLA. After a row that ends with a chunk `start` is none that is ever read.
    """
    q, k, v, log_keep, log_eta, theta = inputs
    T, momentum = q.shape[1], log_eta is not None
    log_keep = jnp.zeros_like(theta) if log_keep is None else log_keep
    log_eta = jnp.full_like(theta, LOG_FLOOR) if log_eta is None else log_eta
    gates = [x.astype(jnp.float32) for x in (log_keep, log_eta, theta)]
    positions = None if documents_BT is None else positions_in_documents(documents_BT, state.position_B)
    zeros = lambda layers: tuple(jnp.zeros_like(w) for w in layers)
    of = lambda s: (s.weights, s.momentum if momentum else zeros(s.weights))
    y_first, first, carried = None, None, None
    if not begins:
        state, y_first, first = _rest_of_chunk(initial, state, inputs, documents_BT, positions, memory)
        carried = of(state)
    weights, steps = of(initial)
    with tuning.device_kind(partition.device_kind()):
        y, *layers = _kernels().neural_memory(
            q, k, v, *gates, weights=weights, momentum=steps, chunk=memory.chunk, residual_norm=memory.residual_norm,
            rates=memory.rates, epsilon=memory.epsilon, read_after_write=memory.read_after_write,
            decayed=memory.grad_at == "decayed", positions=positions, carried=carried, first=first,
            platform=attention_flash.kernel_platform(), interpret=interpret,
        )  # fmt: skip
    y = y.astype(jnp.float32)
    weights, steps, start = layers
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), q.shape[:2])
    of_chunk = jnp.arange(T) >= T - 1 - positions[:, -1:] % memory.chunk
    log_kept = jnp.sum(jnp.where(of_chunk[..., None], gates[0], 0), axis=1)
    if not begins:
        y = jnp.where((jnp.arange(T) < first[:, None])[..., None, None], y_first, y)
        all_taken = first == T  # the row ends in the chunk in which it begins
        choose = lambda a, b: jnp.where(all_taken.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        start = tuple(map(choose, state.start, start))
        log_kept = choose(state.log_keep_BH, log_kept)
    return y, MemoryState(weights, steps if momentum else (), start, log_kept, positions[:, -1] + 1)


def _rest_of_chunk(initial, state, inputs, documents_BT, positions_BT, memory: MemorySpec):
    """The state after the rest of the chunk in which each row begins, y [B, T, H, d] of it, and its positions [B]."""
    T, C = positions_BT.shape[1], memory.chunk
    own = jnp.sum(documents_BT == 0, axis=1, dtype=jnp.int32)
    phase = state.position_B % C
    taken = jnp.where(phase > 0, jnp.minimum(C - phase, own), 0)
    L = min(C, T)
    slots = ChunkStep(
        documents_BC=jnp.where(jnp.arange(L) < taken[:, None], documents_BT[:, :L], -1),
        position_BC=positions_BT[:, :L],
        fresh_B=jnp.zeros_like(taken, bool),
        last_B=jnp.maximum(taken - 1, 0),
        taken_B=taken > 0,
    )
    wide = jax.tree.map(lambda x: x[:, :L].astype(jnp.float32), inputs)
    state, y = chunk_step(memory, initial, state, wide, slots)
    return state, jnp.pad(y, ((0, 0), (0, T - L), (0, 0), (0, 0))), taken
