"""What the kernels of all platforms are told."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

LOG2E = math.log2(math.e)
NOTHING = 1e30  # lse2, for the backward, of a row that sees nothing


def platform_of(name: str, platform: str | None, interpret: Any, allowed: tuple[str, ...]) -> str:
    """Whose kernel runs: `platform`, or by default that of jax's default device, or "tpu" if interpreted.

    Raises ValueError where it is none of those allowed, for the function `name`.
    """
    if platform is None:
        default = jax.default_backend()
        platform = "tpu" if interpret else {"gpu": "cuda"}.get(default, default)
    if platform not in allowed:
        raise ValueError(f"{name}: no kernel for platform {platform!r}; allowed: {', '.join(allowed)}")
    return platform


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static, as given to `flash_attention`.

    Attributes:
      kind: of the devices, for their tables (`kernels_pallas.tuning.kind`).
      low, high: whether there are starts, and ends.
      keys_seen: whether every key is known to be seen by some row.
    """

    platform: str
    kind: str
    scale: float
    soft_cap: float | None
    interpret: Any
    blocks: Any
    deterministic: bool
    low: bool
    high: bool
    keys_seen: bool = False
