"""Chips to compile for that are not here: TPUs by libtpu, NVIDIA's Hopper by jax's CUDA plugin.

Both packages hold a whole compiler. The TPU's knows its chips by name; the GPU's is told what the chip is.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
import jaxlib

from attnlab.config import show
from attnlab.errors import UserError
from attnlab.train.hardware import CHIPS, Chip

TPU_EXAMPLES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16", "v4:4x4x4", "tpu7x:4x4x4", "2*v5p:4x4x4 (two slices)")
GPU_EXAMPLES = ("h100:8 (one host)", "h100:4x8 (four hosts of eight)", "h200:8")
_PER_HOST = 8  # GPUs that NVLink joins, at most

# What XLA's compiler asks of a GPU (its GpuTargetConfig, in protobuf's text form). From NVIDIA's "H100 Tensor Core GPU
# Architecture" and the CUDA C++ Programming Guide's table for compute capability 9.0; an H200 has other memory alone.
_HOPPER = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_GPU_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


def prepare() -> None:
    """Lets the compilers be loaded with none of their chips; call it before jax looks for devices."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # What libtpu would ask a TPU host for, and warns about; the topology's name says what is compiled for.
    host = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    for name, value in (host | {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
      name: as in `v5p:4x4x4`, `2*v5p:4x4x4`, `h100:4x8`.
      devices: jax's descriptions of them.
      chip: its published figures, those of one jax device: a share where a chip is several.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip

    @classmethod
    def of(cls, name: str) -> Target:
        """The target of a topology's name.

        Raises:
          UserError: the name is no topology, or the compiler is not installed.
        """
        found = re.fullmatch(r"(?:(\d{1,6})\*)?([\w-]+):(\d{1,6}(?:x\d{1,6}){0,2})", name)
        slices, kind, shape = found.groups() if found else (None, "", "")
        sizes = [int(n) for n in shape.split("x") if n]
        if kind in _GPU_NAMES:
            return cls._gpu(name, kind, sizes, slices)
        if kind not in CHIPS or kind.startswith("a100") or len(sizes) < 2 or slices == "0":
            raise UserError(f"topology {show(name)} is unknown; allowed: {_examples()}")
        return cls._tpu(name, kind, shape, sizes, int(slices or 1))

    @classmethod
    def _tpu(cls, name: str, kind: str, shape: str, sizes: list[int], slices: int) -> Target:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("the TPU compiler is missing; it is a package: pip install libtpu (or attnlab[compile])")
        from jax.experimental import topologies

        # A host has four chips; what is smaller than that is one host.
        options = {"chips_per_host_bounds": tuple(sizes + [1] * (3 - len(sizes)))} if math.prod(sizes) < 4 else {}
        if slices > 1:
            options["num_slices"] = slices
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0].partition(": ")[2]
            raise UserError(f"topology {name!r} is not possible: {reason}; e.g. {', '.join(TPU_EXAMPLES)}") from None
        share = slices * math.prod(sizes) / len(devices)
        return cls(name, tuple(devices), CHIPS[kind].times(share))

    @classmethod
    def _gpu(cls, name: str, kind: str, sizes: list[int], slices: str | None) -> Target:
        hosts, each = sizes if len(sizes) == 2 else (1, *sizes) if len(sizes) == 1 else (0, 0)
        if slices is not None or hosts < 1 or not 1 <= each <= _PER_HOST:
            raise UserError(
                f"topology {name!r} is not possible; "
                f"allowed: 1 to {_PER_HOST} GPUs a host, e.g. {', '.join(GPU_EXAMPLES)}"
            )
        _require_cuda_compiler()
        import jax._src.xla_bridge  # noqa: F401  registers the plugin
        from jax.experimental import topologies

        chip = CHIPS[kind]
        about = _HOPPER.format(name=_GPU_NAMES[kind], memory=int(chip.hbm), bandwidth=int(chip.bandwidth))
        topology = topologies.get_topology_desc(
            kind, platform="cuda", target_config=about, topology=f"1x{hosts}x{each}"
        )
        return cls(name, tuple(topology.devices), chip)

    def domains(self, devices: list[Any]) -> list[int]:
        """For each device, which of the groups that the fast interconnect joins it is in: TPU slices, GPU hosts."""
        if devices[0].platform == "tpu":
            return [getattr(d, "slice_index", None) or 0 for d in devices]
        return [d.process_index for d in devices]


def _examples() -> str:
    return f"TPUs by chip and shape, e.g. {', '.join(TPU_EXAMPLES)}; GPUs by number, e.g. {', '.join(GPU_EXAMPLES)}"


def _require_cuda_compiler() -> None:
    """The plugin must be of jaxlib's version: another one is refused by jax in ways that do not say so."""
    version = jaxlib.__version__
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"the compiler for NVIDIA GPUs is missing; it is a package that needs no GPU: "
                f"pip install jax-cuda13-plugin=={version} (or attnlab[compile-cuda])"
            ) from None
        if installed != version:
            raise UserError(
                f"{package} {installed} does not go with jaxlib {version}; pip install jax-cuda13-plugin=={version} "
                f"jax-cuda13-pjrt=={version}"
            )
