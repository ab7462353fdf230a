"""The deep memory of Titans (Behrouz et al. 2025, arXiv:2501.00663) with its weights and momentum in fast memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuning
from kernels_pallas.flash_attention.call import platform_of
from kernels_pallas.neural_memory import cost, gpu, gpu_deep, tpu_backward, tpu_forward
from kernels_pallas.neural_memory.call import Call, group_of, segment_of
from kernels_pallas.neural_memory.gradient import memory

__all__ = ["does_not_fit", "gpu_kernel_flops", "gpu_unsupported", "kernel_flops", "neural_memory", "steps"]

gpu_unsupported = gpu.unsupported

Layers = tuple[jax.Array, ...]


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_keep: jax.Array,
    log_eta: jax.Array,
    theta: jax.Array,
    *,
    weights: Layers,
    momentum: Layers,
    chunk: int,
    residual_norm: bool,
    rates: tuple[float, ...],
    epsilon: float = 1e-6,
    read_after_write: bool = True,
    decayed: bool = False,
    positions: jax.Array | None = None,
    carried: tuple[Layers, Layers] | None = None,
    first: jax.Array | None = None,
    group: int | None = None,
    platform: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, Layers, Layers, Layers]:
    """`S_t = eta_t S_{t-1} - theta_t grad(W_{t'}; k_t, v_t)`, `W_t = keep_t W_{t-1} + S_t`, `y_t = M_{W_t}(q_t)`, with
    the gradient of `1/2 |M_W(k_t) - v_t|^2` at t', the last position of the chunk before; chunks are counted from each
    document's beginning. `M_W(x)` has GELUs in tanh form between its layers; with `residual_norm` it is
    `x + LN(net(x))`.

    Args:
      q, k, v: [B, T, H, d], all bfloat16 or all float32; products are in that dtype, all else is float32.
      log_keep, log_eta, theta: [B, T, H], float32: logarithms (at most 0) of what remains of weights and momentum, and
        the step.
      weights, momentum: where documents begin, for each layer [1 or B, H, i, o], float32.
      chunk: a multiple of 16.
      rates: of each layer, relative to theta.
      epsilon: added to the variance.
      read_after_write: whether y_t reads W_t; else W_{t-1}.
      decayed: whether gradients are taken at what forgetting has left, at t, of W_{t'}.
      positions: int32 [B, T], of each position in its document, 0 begins one; None: each row is one document.
      carried: weights and momentum before each row [B, H, i, o], for rows that begin inside a document.
      first: int32 [B]: the kernel begins at this position, which is the beginning of a chunk; y before it may be
        anything. None: 0.
      group: chunks that are taken at once, 2 or more; it changes rounding alone. None: as many as are fast; Hopper: 64.
      platform: whose kernels, "tpu" or "cuda" (Hopper; bfloat16, one layer, or two with 64 hidden units, heads of 64
        with a norm: `gpu.unsupported`).
      interpret: runs it as plain XLA operations on any platform, or as the interpreter's parameters say
        (`jax.experimental.pallas.tpu.InterpretParams`). Hopper's run on a CPU, by jax's interpreter of GPU kernels.

    Returns:
      y [B, T, H, d] in the dtype of q; the weights and the momentum after the last position, and the weights at the
      beginning of its chunk, if that is not complete; per layer [B, H, i, o], float32. Differentiable (reverse mode) in
      every array of floats.

    Raises:
      ValueError: shapes, dtypes or options that do not fit, or a memory that does not fit on the chip.
    """
    B, T = q.shape[:2]
    gates = log_keep, log_eta, theta
    _check(q, k, v, gates, weights, momentum, chunk, rates)
    packed = positions is not None or first is not None or carried is not None
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions.astype(jnp.int32)
    first = jnp.zeros((B,), jnp.int32) if first is None else first
    if platform_of("neural_memory", platform, interpret, ("tpu", "cuda")) == "cuda":
        options = chunk, tuple(rates), epsilon, read_after_write, decayed, residual_norm, group, interpret, packed
        return _on_hopper(q, k, v, gates, weights, momentum, carried, positions, first, *options)
    options = dict(
        chunk=chunk, residual_norm=residual_norm, rates=tuple(rates), epsilon=epsilon,
        read_after_write=read_after_write, decayed=decayed, group=group, interpret=interpret,
    )  # fmt: skip
    return _on_tpu(q, k, v, gates, weights, momentum, carried, positions, first, **options)


def _on_tpu(
    q, k, v, gates, weights, momentum, carried, positions, first, *, chunk, group, interpret, **options
) -> tuple[jax.Array, Layers, Layers, Layers]:
    B, T, H, _ = q.shape
    widths = tuple(w.shape[-2] for w in weights) + (q.shape[-1],)
    if reason := does_not_fit(widths, chunk, str(q.dtype), T):
        raise ValueError(f"neural_memory: {reason}")
    group = 2 if interpret and not group else group  # fewer compile sooner
    call = _call(
        B, T, H, widths, str(q.dtype), chunk, group, carried=carried is not None, interpret=interpret, **options
    )
    starts, carries = _joined(weights, momentum), () if carried is None else _joined(*carried)
    y, end, before = memory(call, q, k, v, gates, starts, carries, positions, first)
    return y, *_parted(end), _parted(before)[0]


def _on_hopper(
    q, k, v, gates, weights, momentum, carried, positions, first,
    chunk, rates, epsilon, read_after_write, decayed, residual_norm, group, interpret, packed,
) -> tuple[jax.Array, Layers, Layers, Layers]:  # fmt: skip
    widths = tuple(w.shape[-2] for w in weights) + (q.shape[-1],)
    if reason := gpu.unsupported(widths, chunk, str(q.dtype), residual_norm):
        raise ValueError(f"neural_memory on cuda: {reason}")
    if group is not None:
        raise ValueError(f"neural_memory on cuda: group={group}; allowed: None")
    epsilon, arrays, deep = epsilon if residual_norm else None, (q, k, v, gates), len(weights) > 1
    rules = read_after_write, decayed, interpret, packed
    kernels, states = (gpu_deep, gpu_deep.joined) if deep else (gpu, lambda *x: jnp.stack([y[0] for y in x], axis=2))
    call = gpu_deep.Call(chunk, 1.0, epsilon, *rules, rates) if deep else gpu.Call(chunk, rates[0], epsilon, *rules)
    carries = None if carried is None else states(*carried)
    y, end, before = kernels.memory(call, *arrays, states(weights, momentum), carries, positions, first)
    if deep:
        return y, *gpu_deep.parted(end), gpu_deep.parted(before)[0]
    return y, (end[:, :, 0],), (end[:, :, 1],), (before,)


def _joined(weights: Layers, momentum: Layers) -> Layers:
    """[W S] of each layer, as `Call.shapes` says."""
    return tuple(jnp.concatenate(pair, -1 if n else -2) for n, pair in enumerate(zip(weights, momentum)))


def _parted(states: Layers) -> tuple[Layers, Layers]:
    """The opposite."""
    weights, momentum = zip(*(jnp.split(x, 2, -1 if n else -2) for n, x in enumerate(states)))
    return weights, momentum


def does_not_fit(widths: tuple[int, ...], chunk: int, dtype: str, length: int) -> str | None:
    """Why one head's memory, with widths of its layers d, hidden ones, d, does not fit on the chip; None: it does."""
    rows = chunk * group_of(chunk)
    call = _call(1, length, 1, widths, dtype, chunk)
    limit = tuning.vmem_limit(call.kind)
    need = max(call.step_bytes(direction, 1) for direction in ("forward", "backward"))
    if need <= limit:
        return None
    mib = lambda n: f"{n / 2**20:.1f} MiB"
    what = f"a head's memory of layers {'x'.join(map(str, widths))}, {rows} positions at a time,"
    return f"{what} needs {mib(need)} of fast memory; allowed: {mib(limit)}"


def kernel_flops(
    batch: int, length: int, heads: int, widths: tuple[int, ...], dtype: str, chunk: int
) -> dict[str, float]:
    """FLOPs of one run of each kernel, by name."""
    flops = cost.forward_flops(_call(batch, length, heads, widths, dtype, chunk))
    return {tpu_forward.NAME: flops, tpu_backward.NAME: 4 * flops}


def gpu_kernel_flops(count: int, widths: tuple[int, ...], chunk: int, normed: bool) -> dict[str, float]:
    """As `kernel_flops`, of Hopper's, for so many positions."""
    deep = len(widths) > 2
    each = gpu_deep.kernel_widths(chunk, normed) if deep else gpu.kernel_widths(widths[0], chunk, normed)
    return {name: 2.0 * count * n for name, n in each.items()}


def steps(length: int, heads: int, widths: tuple[int, ...], dtype: str, chunk: int) -> dict[str, dict[str, int]]:
    """Heads of a grid step, positions of a group, and of a segment, of both kernels."""
    call = _call(1, length, heads, widths, dtype, chunk)
    of = lambda part: {"heads": call.heads_of_step(part), "rows": call.rows, "segment": call.segment}
    return {part: of(part) for part in ("forward", "backward")}


_SHAPE = dict(residual_norm=True, rates=(), epsilon=0.0, read_after_write=True, decayed=False, carried=False)


def _call(
    batch: int,
    length: int,
    heads: int,
    widths: tuple[int, ...],
    dtype: str,
    chunk: int,
    group: int | None = None,
    **options: Any,
) -> Call:
    """What is static; `group` None: as many chunks as are fast. Without options what only shapes decide."""
    group = group or group_of(chunk)
    rows = chunk * group
    return Call(
        kind=tuning.kind(), batch=batch, length=-(-length // rows) * rows, heads=heads, widths=widths, dtype=dtype,
        chunk=chunk, group=group, segment=segment_of(length, rows), **(options or _SHAPE),
    )  # fmt: skip


def _check(q, k, v, gates, weights, momentum, chunk: int, rates: tuple[float, ...]) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"neural_memory: {what}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    need(q.ndim == 4 and q.shape == k.shape == v.shape, f"{shapes}; expected one shape [B, T, H, d]")
    dtypes = {x.dtype.name for x in (q, k, v)}
    need(len(dtypes) == 1 and dtypes <= {"bfloat16", "float32"}, f"q, k, v {dtypes}; allowed: bfloat16, or float32")
    for name, gate in zip(("log_keep", "log_eta", "theta"), gates):
        need(gate.shape == q.shape[:3], f"{name} {gate.shape}; expected {list(q.shape[:3])}")
        need(gate.dtype == jnp.float32, f"{name} {gate.dtype}; expected float32")
    need(chunk >= 16 and chunk % 16 == 0, f"chunk={chunk}; allowed: multiples of 16")
    counts = len(weights), len(momentum), len(rates)
    need(len(set(counts)) == 1 and counts[0] > 0, f"{counts} weights, momenta, rates; expected as many of each")
    width = q.shape[3]
    for w, s in zip(weights, momentum):
        good = w.ndim == 4 and w.shape == s.shape and w.shape[1:3] == (q.shape[2], width)
        need(good, f"weights {w.shape}, momentum {s.shape}; expected [1 or B, {q.shape[2]}, {width}, o]")
        need(w.dtype == s.dtype == jnp.float32, f"weights {w.dtype}, momentum {s.dtype}; expected float32")
        width = w.shape[3]
    need(width == q.shape[3], f"the last layer's width is {width}; expected {q.shape[3]}, as of q")
