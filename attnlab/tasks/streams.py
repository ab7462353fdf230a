"""Random streams that are the same on every machine and with every version of NumPy: the examples of tasks.

NumPy freezes the bits of its generators, not what its `Generator` makes of them; so all is made of the bits here.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np


def stream_key(identity: Any) -> np.ndarray:
    """The generator's key, uint64 [2], of anything that JSON can say; for streams of many indices, made once."""
    text = json.dumps(identity, sort_keys=True).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint64)


class Stream:
    """The random numbers of one example.

    Args:
      identity: of the task: config, version, split, seed; anything that JSON can say, or the `stream_key` of that.
      index: of the example. It is the highest word of the generator's counter, reading moves the lowest: streams of
        one identity never overlap.
    """

    def __init__(self, identity: Any, index: int):
        key = identity if isinstance(identity, np.ndarray) else stream_key(identity)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64))

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count], from 0, below 1."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def normal(self, *shape: int) -> np.ndarray:
        """float64, standard normal (Box and Muller 1958)."""
        count = math.prod(shape)
        radius = np.sqrt(-2 * np.log1p(-self.uniform(count)))
        return (radius * np.cos(2 * np.pi * self.uniform(count))).reshape(shape)

    def integers(self, below: int, count: int) -> np.ndarray:
        """int64 [count], uniform on 0 to below - 1, up to a bias of below / 2^32."""
        return ((self._bits.random_raw(count) >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)

    def integer(self, below: int) -> int:
        """One of `integers`."""
        return int(self.integers(below, 1)[0])

    def permutation(self, count: int) -> np.ndarray:
        """int64 [count], a uniform order of 0 to count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def distinct(self, count: int, below: int) -> np.ndarray:
        """int64 [count], different ones of 0 to below - 1, in uniform order."""
        return self.permutation(below)[:count]

    def weighted(self, log_weights: np.ndarray, count: int) -> np.ndarray:
        """int64 [count], drawn one after another without replacement, each time by the weights that are left.

        The largest of `log w - log(-log U)` (Gumbel 1954; Yellott 1977) follow this law.
        """
        noise = -np.log(-np.log(np.maximum(self.uniform(len(log_weights)), 2.0**-54)))
        return np.argsort(-(log_weights + noise), kind="stable")[:count]
