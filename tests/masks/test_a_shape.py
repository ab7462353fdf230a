"""A window with sinks."""

import numpy as np

from tests.masks.laws import held_to_the_laws


def sees(config, n):
    t, s = np.ogrid[:n, :n]
    return (np.abs(t - s) < config.window) | (s < config.sinks)


def test_laws():
    held_to_the_laws("a_shape", sees, {"window": 4, "sinks": 2}, {"window": 1, "sinks": 0}, {"window": 50, "sinks": 1})
