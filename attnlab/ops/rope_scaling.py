"""Frequencies of the rotary embedding for longer texts than a model was trained on, by three published rules.

Each rule is a node by name. It turns the plain inverse frequencies `f_i = base^(-2i / d)` into others, and may multiply
what is rotated by a factor.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from attnlab import config as config_lib


@dataclasses.dataclass(frozen=True)
class Scaling(abc.ABC):
    """Base of the rules.

    Attributes:
      factor: s, how many times longer texts are.
    """

    node_name: ClassVar[str]
    factor: float

    def __post_init__(self) -> None:
        config_lib.require(self.factor >= 1, "factor", self.factor, "1 or more")

    @abc.abstractmethod
    def of(self, base: float, d: int) -> tuple[np.ndarray, float]:
        """Inverse frequencies [d / 2] in float64, and the factor on cosines and sines."""


def _plain(base: float, d: int) -> np.ndarray:
    return float(base) ** (-np.arange(0, d, 2) / d)


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """`f / s`: positions are divided by s (Chen et al. 2023, Position Interpolation, arXiv:2306.15595, eq. 3)."""

    node_name = "linear"

    def of(self, base: float, d: int) -> tuple[np.ndarray, float]:
        return _plain(base, d) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Wavelengths above `original_length / low` are stretched s times, those below `original_length / high` are not,
    and between them a share `m = (original_length / wavelength - low) / (high - low)` of f is kept (Llama 3.1).
    """

    node_name = "llama3"
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(self.original_length >= 1, "original_length", self.original_length, "1 or more")
        config_lib.require(0 < self.low < self.high, "low", self.low, f"above 0, below high ({self.high})")

    def of(self, base: float, d: int) -> tuple[np.ndarray, float]:
        f = _plain(base, d)
        kept = np.clip((self.original_length * f / (2 * np.pi) - self.low) / (self.high - self.low), 0, 1)
        return (1 - kept) * f / self.factor + kept * f, 1.0


@dataclasses.dataclass(frozen=True)
class Yarn(Scaling):
    """Frequencies that turn more than `fast` times in `original_length` stay, those below `slow` turns are divided by
    s, a ramp over channels lies between, and what is rotated is multiplied by `attention_factor` (Peng et al. 2023,
    YaRN, arXiv:2309.00071, section 3).

    Attributes:
      attention_factor: none: `0.1 ln s + 1`.
      truncate: whether the ramp begins and ends at whole channels.
    """

    node_name = "yarn"
    original_length: int = 8192
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.original_length >= 1, "original_length", self.original_length, "1 or more")
        need(0 < self.slow < self.fast, "slow", self.slow, f"above 0, below fast ({self.fast})")
        factor = self.attention_factor
        need(factor is None or factor > 0, "attention_factor", factor, "above 0, or none")

    def of(self, base: float, d: int) -> tuple[np.ndarray, float]:
        f = _plain(base, d)
        channel = lambda turns: d * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
        low, high = channel(self.fast), channel(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        high += 0.001 * (high == low)
        stretched = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
        factor = 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor
        return stretched * f / self.factor + (1 - stretched) * f, factor


SCALINGS: dict[str, type[Scaling]] = {cls.node_name: cls for cls in (Linear, Llama3, Yarn)}


def scaling_from_node(tree: Any, path: str) -> Scaling | None:
    """The typed rule of a node `{"name": ..., **fields}`; None where it is none.

    Raises:
      ConfigError: an unknown name, key, or value.
    """
    if isinstance(tree, Scaling):
        return tree
    named = tree.get("name", "") if isinstance(tree, Mapping) else tree  # an override of a node by none sets its name
    named = named.text if isinstance(named, config_lib.Override) else named
    if named is None or (isinstance(named, str) and named.lower() in ("none", "null")):
        return None
    name, fields = config_lib.split_name(tree, path, SCALINGS)
    return config_lib.build(SCALINGS[name], fields, path)
