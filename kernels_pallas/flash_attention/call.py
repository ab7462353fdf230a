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


def check_arrays(op: str, q: jax.Array, k: jax.Array, v: jax.Array, starts: Any, ends: Any) -> None:
    """Raises ValueError for queries, keys, values and intervals that do not fit."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{op}: {what}")

    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    need(q.ndim == k.ndim == v.ndim == 4, f"{shapes}; each must be [batch, length, heads, width]")
    (B, T, H, d), (S, K), e = q.shape, k.shape[1:3], v.shape[3]
    need(
        k.shape == (B, S, K, d) and v.shape[:3] == (B, S, K),
        f"{shapes} do not fit; expected q [B, T, H, d], k [B, S, K, d], v [B, S, K, e]",
    )
    need(min(B, T, S, K, H, d, e) > 0, f"{shapes}; no size may be 0")
    need(H % K == 0, f"{H} query heads over {K} key heads; H must be a multiple of K")
    dtypes = q.dtype, k.dtype, v.dtype
    need(
        len(set(dtypes)) == 1 and q.dtype in ("bfloat16", "float32"),
        f"q {q.dtype}, k {k.dtype}, v {v.dtype}; allowed: all bfloat16, or all float32",
    )
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None:
            need(bound.shape in ((B, T), (1, T)), f"{name} {bound.shape}; expected [{B}, {T}] or [1, {T}]")
            need(bound.dtype.kind in "iu", f"{name} {bound.dtype}; expected integers")
