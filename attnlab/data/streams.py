"""Random streams that are the same on every machine and with every version of NumPy: the examples of tasks.

NumPy freezes the bits of its generators, not what its `Generator` makes of them; so all is made of the bits here.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np


class Stream:
    """The random numbers of one example.

    Args:
      identity: of the task: config, version, split, seed; anything that JSON can say.
      index: of the example. It is the highest word of the generator's counter, reading moves the lowest: streams of
        one identity never overlap.
    """

    def __init__(self, identity: Any, index: int):
        text = json.dumps(identity, sort_keys=True).encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64))

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count], from 0, below 1."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def normal(self, *shape: int) -> np.ndarray:
        """float64, standard normal (Box and Muller 1958)."""
        count = math.prod(shape)
        radius = np.sqrt(-2 * np.log1p(-self.uniform(count)))
        return (radius * np.cos(2 * np.pi * self.uniform(count))).reshape(shape)
