"""The gated delta rule by our kernels (`kernels_pallas.delta_rule`), for TPU and Hopper: the states stay on chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnlab.ops import attention_flash
from attnlab.ops.recurrence_kernel import device_kind, finite_logs, first_positions
from attnlab.parallel import partition
from kernels_pallas import tuning

if TYPE_CHECKING:
    from attnlab.ops.delta_rule import DeltaSpec

_CHUNK = 64  # below so many positions most of a chunk is padding


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import delta_rule

    return delta_rule


def unsupported(spec: DeltaSpec) -> str | None:
    """Why the kernel cannot serve, or None."""
    if partition.platform() == "gpu":
        reason = _kernels().gpu_unsupported(spec.dtype, spec.width, channels=spec.channels)
        return reason or attention_flash.unsupported_heads(spec.dtype, spec.width)
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    if _kernels().default_sizes(*_arrays(spec), device_kind(), spec.channels) is None:
        return f"a head's state of {spec.width} x {spec.value_width} does not fit into fast memory"
    return None


def worth(spec: DeltaSpec) -> bool:
    """Whether "auto" takes it: not for less than a chunk."""
    return spec.positions >= _CHUNK


def kernel_flops(spec: DeltaSpec) -> dict[str, float]:
    """FLOPs of one run of each kernel."""
    if partition.platform() == "gpu":
        return _kernels().gpu_kernel_flops(*_arrays(spec))
    return _kernels().kernel_flops(*_arrays(spec), device_kind(), spec.channels)


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    documents: jax.Array | None,
    state: jax.Array | None,
    *,
    chunk: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attnlab.ops.delta_rule.delta_rule`; `interpret` runs the TPU's as plain XLA, on any platform.

    Products are of numbers in the dtype of v, sums and states float32; the output carries the checkpoint name
    "attention_o". The chunk is the kernel's own.
    """
    del chunk
    with tuning.device_kind(partition.device_kind()):
        return _kernels().delta_rule(
            q.astype(v.dtype), k.astype(v.dtype), v, finite_logs(log_decay), beta,
            starts=None if documents is None else first_positions(documents),
            state=None if state is None else state.astype(jnp.float32),
            platform=attention_flash.kernel_platform(), interpret=interpret,
        )  # fmt: skip


def _arrays(spec: DeltaSpec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Queries and values."""
    of = lambda width: jax.ShapeDtypeStruct((spec.batch, spec.positions, spec.heads, width), spec.dtype)
    return of(spec.width), of(spec.value_width)
