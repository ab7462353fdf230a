"""What `benchmarks.kernels` measures: shapes, masks, and the same random arrays for whoever computes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

PEERS = ("ours", "cudnn", "tokamax", "xla", "torch sdpa", "torch flex_attention")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: shapes as in `kernels_pallas.flash_attention`; T rows and as many keys.

    Attributes:
      mask: "all", "causal", "window" (causal), or "documents" (causal).
      window: keys that a row sees, itself included.
      extras: of sinks, gate, cap and bias, those that it has.
      deterministic: whether gradients are asked to be the same bits in every run.
    """

    name: str
    B: int
    T: int
    H: int
    K: int
    d: int
    e: int
    mask: str
    window: int | None = None
    extras: tuple[str, ...] = ()
    deterministic: bool = False

    peers = PEERS

    @property
    def family(self) -> tuple[Any, ...]:
        """What a case that is wrong says of others: those of heads as wide."""
        return self.d, self.e

    def tiny(self) -> Case:
        """The same in small, to try a program where it would take too long."""
        return dataclasses.replace(self, B=1, T=24, H=2, K=1 if self.K < self.H else 2, window=self.window and 7)

    def seen(self) -> float:
        """Pairs of a row and a key that it sees, of one head of one sequence."""
        starts, ends = self.bounds()
        return float((ends.astype(np.int64) - starts).sum() / len(starts))

    def flops(self, backward: bool) -> float:
        """Of the products of a forward pass, or of forward and backward; hidden pairs and repeated work not counted."""
        forward = 2.0 * self.B * self.H * self.seen() * (self.d + self.e)
        return 3.5 * forward if backward else forward

    def documents(self) -> np.ndarray:
        """Document of each position [B, T], of lengths about T / 8."""
        rng = np.random.default_rng(7)
        ends = [np.cumsum(rng.integers(self.T // 16 + 1, self.T // 5 + 2, 32)) for _ in range(self.B)]
        return np.stack([np.searchsorted(row, np.arange(self.T), side="right") for row in ends])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the keys that rows see, int32 [B or 1, T]."""
        t = np.arange(self.T, dtype=np.int32)[None]
        if self.mask == "all":
            return 0 * t, 0 * t + self.T
        if self.mask == "causal":
            return 0 * t, t + 1
        if self.mask == "window":
            return np.maximum(t - self.window + 1, 0), t + 1
        documents = self.documents()
        first = np.stack([np.searchsorted(row, row, side="left") for row in documents]).astype(np.int32)
        return first, np.broadcast_to(t + 1, first.shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of q, k, v, do and the extras' arrays."""
        B, T, H, K = self.B, self.T, self.H, self.K
        shapes = {"q": (B, T, H, self.d), "k": (B, T, K, self.d), "v": (B, T, K, self.e), "do": (B, T, H, self.e)}
        more = {"sinks": ("sinks", (H,)), "gate": ("gate", (B, T, H, self.e)), "bias": ("key_bias", (B, K, T))}
        return shapes | dict(more[extra] for extra in self.extras if extra in more)

    def arrays(self) -> dict[str, np.ndarray]:
        """Normal numbers in float32, the same whenever and by whomever they are asked for."""
        rng = np.random.default_rng(0)
        return {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes().items()}

    @property
    def soft_cap(self) -> float | None:
        return 30.0 if "cap" in self.extras else None


_ALL = ("sinks", "gate", "cap", "bias")
# Every width for which tile sizes are shipped, without and with everything, at a length that fills no tile.
PARITY = [
    Case(f"{d}/{e} {mask}{' ' + '+'.join(extras) if extras else ''}{', deterministic' if deterministic else ''}",
         2, 1000, 4, 2, d, e, mask, 100 if mask == "window" else None, extras, deterministic)
    for d, e in ((64, 64), (128, 128), (256, 256), (192, 128), (96, 96))
    for mask, extras, deterministic in (("documents", _ALL, False), ("window", ("sinks",), True), ("causal", (), False))
]  # fmt: skip
# The most telling first: what time does not allow is left out from the end.
TIMED = [
    Case("128 causal", 2, 8192, 16, 16, 128, 128, "causal"),
    Case("128 all", 2, 8192, 16, 16, 128, 128, "all"),
    Case("64 causal", 2, 8192, 32, 32, 64, 64, "causal"),
    Case("256 causal", 2, 8192, 8, 8, 256, 256, "causal"),
    Case("128 causal, grouped", 4, 4096, 32, 8, 128, 128, "causal"),
    Case("128 documents", 2, 8192, 16, 16, 128, 128, "documents"),
    Case("128 window 512", 2, 8192, 16, 16, 128, 128, "window", 512),
    Case("64 all", 2, 8192, 32, 32, 64, 64, "all"),
    Case("128 causal sinks+gate", 2, 8192, 16, 16, 128, 128, "causal", None, ("sinks", "gate")),
    Case("128 causal cap", 2, 8192, 16, 16, 128, 128, "causal", None, ("cap",)),
    Case("128 causal, deterministic", 2, 8192, 16, 16, 128, 128, "causal", None, (), True),
    Case("192/128 causal", 2, 8192, 16, 16, 192, 128, "causal"),
]
