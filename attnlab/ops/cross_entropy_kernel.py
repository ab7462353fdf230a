"""Cross-entropy by our kernels (`kernels_pallas.cross_entropy`), for TPU and Hopper: logits never leave the chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from attnlab.ops import attention_flash
from attnlab.ops.recurrence_kernel import device_kind
from attnlab.parallel import partition
from kernels_pallas import tuning

if TYPE_CHECKING:
    from attnlab.ops.cross_entropy import CrossEntropySpec

_ROWS = 128  # of fewer most of a tile is padding
# XLA holds all logits from forward to backward and computes them once, the kernels twice. Up to such widths their
# schedule is shorter than the time that XLA's bytes take (docs/kernels.md); of other chips this is not known.
_WIDEST = {"v6e": 512}
# Bytes of logits in float32 that are a quarter of a device's memory: from there on it matters more not to hold them.
_HELD = {"v5e": 4 * 2**30, "v5p": 24 * 2**30, "v6e": 8 * 2**30, "tpu7x": 24 * 2**30}
_HELD_H100, _HELD_H200 = 18 * 2**30, 32 * 2**30


def _kernels() -> Any:
    """Imported where they run: what has no kernels need not wait for Pallas, which takes longer than the rest here."""
    from kernels_pallas import cross_entropy

    return cross_entropy


def unsupported(spec: CrossEntropySpec) -> str | None:
    """Why the kernels cannot serve, or None."""
    if spec.cap is not None:
        return "it knows no cap of the logits"
    if partition.platform() == "gpu":
        return _kernels().gpu_unsupported(spec.dtype) or attention_flash.not_hopper()
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it computes bfloat16 and float32, not {spec.dtype}"
    itemsize = 2 if spec.dtype == "bfloat16" else 4
    if _kernels().default_sizes(spec.rows, spec.width, spec.columns, itemsize, device_kind()) is None:
        return f"a tile of rows of width {spec.width} does not fit into fast memory"
    return None


def worth(spec: CrossEntropySpec) -> bool:
    """Whether "auto" takes it: for narrow hidden states, and where logits are a large part of a device's memory.

    On GPUs for that memory alone: which form is faster there has not been timed.
    """
    kind, held = device_kind(), 4 * spec.rows * spec.columns
    if partition.platform() == "gpu":
        return held >= (_HELD_H200 if "H200" in partition.device_kind() else _HELD_H100)
    if spec.rows < _ROWS or kind not in _HELD:
        return False
    return spec.width <= _WIDEST.get(kind, 0) or held >= _HELD[kind]


def kernel_flops(spec: CrossEntropySpec) -> dict[str, float]:
    """FLOPs of one run of each kernel."""
    if partition.platform() == "gpu":
        return _kernels().gpu_kernel_flops(spec.rows, spec.width, spec.columns, spec.chunk)
    return _kernels().kernel_flops(spec.rows, spec.width, spec.columns)


def run(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, chunk: int, cap: None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `attnlab.ops.cross_entropy.Statistics`; `interpret` runs the TPU's as plain XLA, on any platform. Tiles are
    the kernels' own; by chunks go gradients on GPUs."""
    rows = hidden.shape[:-1]
    with tuning.device_kind(partition.device_kind()):
        lse, logit = _kernels().cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1),
            platform=attention_flash.kernel_platform(), interpret=interpret, chunk=chunk,
        )  # fmt: skip
    return lse.reshape(rows), logit.reshape(rows)
