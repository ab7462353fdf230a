"""What the kernels of all platforms are told."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LOG2E = math.log2(math.e)
NOTHING = 1e30  # lse2, for the backward, of a row that sees nothing


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
