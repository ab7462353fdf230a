"""Published figures of chips: what utilisation is measured against, and what a step cannot be faster than."""

from __future__ import annotations

import dataclasses

import jax

from attnlab import memory
from attnlab.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip, from its maker.

    TPUs: the pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x" of docs.cloud.google.com/tpu/docs. NVIDIA: the data sheets
    of A100, H100 SXM and H200, and for their network that of DGX H100.

    Attributes:
      peak: dense bf16 FLOP/s.
      hbm: bytes of memory.
      bandwidth: bytes/s of memory.
      interconnect: bytes/s that the chip can send to its neighbours, all links together and one way: half of what is
        published as bidirectional (ICI for TPUs, NVLink for GPUs).
      network: bytes/s that it can send beyond those: to other slices (DCN for TPUs), to other hosts (InfiniBand for
        GPUs); None where it is not published.
    """

    peak: float
    hbm: float
    bandwidth: float
    interconnect: float
    network: float | None = None

    def times(self, share: float) -> Chip:
        """The figures of a share of a chip."""
        figures = dataclasses.asdict(self)
        return Chip(**{field: None if value is None else value * share for field, value in figures.items()})


_GIB = 2.0**30
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * _GIB, 1638e9, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12, 192 * _GIB, 7380e9, 600e9),
    "a100-40": Chip(312e12, 40e9, 1555e9, 300e9),
    "a100-80": Chip(312e12, 80e9, 2039e9, 300e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 50e9),
}

# What jax calls a device: of which chip it is, and how many such devices a chip has.
_KINDS = {
    "TPU v4": ("v4", 1),
    "TPU v5 lite": ("v5e", 1),
    "TPU v5e": ("v5e", 1),
    "TPU v5": ("v5p", 1),
    "TPU v5p": ("v5p", 1),
    "TPU v6 lite": ("v6e", 1),
    "TPU v6e": ("v6e", 1),
    "TPU7x": ("tpu7x", 2),
    "NVIDIA A100-SXM4-40GB": ("a100-40", 1),
    "NVIDIA A100-SXM4-80GB": ("a100-80", 1),
    "NVIDIA H100 80GB HBM3": ("h100", 1),
    "NVIDIA H200": ("h200", 1),
}


def peak_flops(devices: int) -> float | None:
    """Peak bf16 FLOP/s of so many devices together; None where the chip's peak is not known (a CPU, a new chip)."""
    kind = _KINDS.get(jax.devices()[0].device_kind)
    return None if kind is None else CHIPS[kind[0]].peak / kind[1] * devices


class PeakBytes:
    """Most bytes of memory that a device of this process has held since this was made."""

    def __init__(self) -> None:
        self._before = _peak_of_process()

    def __call__(self) -> int | None:
        """None where devices do not say, and while it is less than an earlier run of the process has held."""
        held = _peak_of_process()
        return None if held == self._before else held


def _peak_of_process() -> int | None:
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((n for n in held if n is not None), default=None)


def require_memory(config: RunConfig, batch: int, held: int) -> None:
    """Raises UserError where a run surely needs more memory than a CPU's machine has.

    Args:
      config: of the run.
      batch: bytes of a step's batch.
      held: bytes of parameters and whatever else is held all the time, in all processes together.
    """
    # At least the batch's arrays, and the stream from the first layer to the last.
    stream = config.data.batch * config.data.length * config.model.stream_bytes
    memory.require(
        (held + (batch + stream) // config.train.accumulate) // jax.process_count(),
        "what the model holds and a micro-batch",
        "lower the sizes of the model, data.length or data.batch, or raise train.accumulate",
    )
