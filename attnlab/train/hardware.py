"""Published peak rates of chips, for model FLOPs utilisation."""

from __future__ import annotations

import jax

# Dense bf16 peak per jax device, FLOP/s, by `device_kind`; from the makers' data sheets. A v4 or v5p device is a chip.
_PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices: int) -> float | None:
    """Peak bf16 FLOP/s of so many devices together; None where the chip's peak is not known (a CPU, a new chip)."""
    peak = _PEAK_BF16.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * devices
