"""The linear recurrence by our kernels (`kernels_pallas.linear_recurrence`): one pass, the states on chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnlab.ops import attention_flash
from attnlab.parallel import partition
from kernels_pallas import tuning

if TYPE_CHECKING:
    from attnlab.ops.feature_maps import Taylor
    from attnlab.ops.linear_recurrence import RecurrenceSpec

_LANES = 128  # below so many positions most of a chunk is padding


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import linear_recurrence

    return linear_recurrence


def unsupported(spec: RecurrenceSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    if partition.platform() == "gpu":
        if spec.decay == "channels":
            return "on GPUs a position has one decay, not one for each channel"
        return attention_flash.unsupported_heads(spec.dtype, max(_state_width(spec), spec.value_width))
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    if _kernels().default_sizes(*_facts(spec)) is None:
        return f"a head's state of {_state_width(spec)} x {spec.value_width} does not fit into fast memory"
    return None


def worth(spec: RecurrenceSpec) -> bool:
    """Whether "auto" takes it: not for less than a chunk."""
    return spec.positions >= _LANES


def kernel_flops(spec: RecurrenceSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel."""
    if partition.platform() == "gpu":
        return gpu_kernel_flops(spec.batch, spec.positions, spec.heads, _state_width(spec), spec.value_width)
    return _kernels().kernel_flops(*_facts(spec))


def gpu_kernel_flops(batch: int, positions: int, heads: int, width: int, value_width: int) -> dict[str, float]:
    """Of the kernels on GPUs, as `kernel_flops`."""
    return _kernels().gpu_kernel_flops(batch, positions, heads, width, value_width)


def run(
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    log_decay: jax.Array | None,
    documents: jax.Array | None,
    state: jax.Array | None,
    *,
    chunk: int,
    features: Taylor | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attnlab.ops.linear_recurrence.linear_recurrence`; `interpret` runs the TPU's as plain XLA, on any
    platform.

    Products are of numbers in the dtype of q, sums and states float32; the output carries the checkpoint name
    "attention_o". The chunk is the kernel's own. On GPUs queries and keys that all heads share are copied for each.
    """
    del chunk
    platform = attention_flash.kernel_platform()
    if features is not None and platform == "cuda":  # by XLA, and rounded
        q, k = (features(x.astype(jnp.float32)).astype(q.dtype) for x in (q, k))
        features = None
    log_decay = None if log_decay is None else finite_logs(log_decay)
    if platform == "cuda":
        q, k = (jnp.broadcast_to(x, (*u.shape[:3], x.shape[3])) for x in (q, k))
    with tuning.device_kind(partition.device_kind()):
        return _kernels().linear_recurrence(
            q, k.astype(q.dtype), u.astype(q.dtype),
            log_decay=log_decay, starts=None if documents is None else first_positions(documents),
            state=None if state is None else state.astype(jnp.float32), features=kernel_features(features),
            platform=platform, interpret=interpret,
        )  # fmt: skip


def finite_logs(log_decay: jax.Array) -> jax.Array:
    """In float32; a decay of nothing at all, or nearly, is that of the smallest normal number."""
    return jnp.maximum(log_decay.astype(jnp.float32), jnp.log(jnp.finfo(jnp.float32).tiny))


def first_positions(documents_BT: jax.Array) -> jax.Array:
    """The first position of each position's document, -1 of document 0, whose first may be before the row."""
    t = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)
    before = jnp.pad(documents_BT, ((0, 0), (1, 0)))[:, :-1]
    return jax.lax.cummax(jnp.where(documents_BT != before, t, -1), axis=1)


def kernel_features(features: Taylor | None) -> Any:
    """As the kernel takes them (`kernels_pallas.linear_recurrence.Features`)."""
    if features is None:
        return None
    first, second, scale = (tuple(x.tolist()) for x in features.pairs)
    return _kernels().Features(features.width, first, second, scale)


def device_kind() -> str:
    """As `kernels_pallas.tuning` calls it."""
    kind = partition.device_kind()
    return tuning.KINDS.get(kind, kind)


def _state_width(spec: RecurrenceSpec) -> int:
    """d of a head's state."""
    return spec.width if spec.features is None else spec.features.count


def _facts(spec: RecurrenceSpec) -> tuple[Any, ...]:
    """What the kernels' sizes and FLOPs depend on: queries and values, the device, features, whose the decays are."""
    of = lambda heads, width: jax.ShapeDtypeStruct((spec.batch, spec.positions, heads, width), spec.dtype)
    keys, values = of(1 if spec.shared else spec.heads, spec.width), of(spec.heads, spec.value_width)
    return keys, values, device_kind(), kernel_features(spec.features), spec.decay == "channels"
