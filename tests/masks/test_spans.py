"""Spans of heads: `held_to_the_laws(...)` knows one head's mask, so that several are checked beside it."""

import functools

import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError
from tests.masks.heads import each_has_its_own, in_a_layer
from tests.masks.laws import held_to_the_laws


def of_head(width, sinks, n):
    t, s = np.ogrid[:n, :n]
    return (t - s < width) | (s < sinks)


def sees(config, n):
    return of_head(config.spans[0], config.sinks, n)


def test_laws():
    held_to_the_laws(
        "spans", sees, {"spans": (4,), "sinks": 2}, {"spans": (1,), "sinks": 0}, {"spans": (50,), "sinks": 1}
    )


def test_each_head_has_its_own():
    each_has_its_own(
        {"name": "spans", "spans": (1, 4, 9), "sinks": 1}, [functools.partial(of_head, w, 1) for w in (1, 4, 9)]
    )


def test_a_layer_takes_a_span_for_each_head():
    in_a_layer({"name": "spans", "spans": (1, 2, 3, 9), "sinks": 1}, "spans")
    with pytest.raises(ConfigError, match=r"spans = \(0,\)"):
        masks.build({"name": "spans", "spans": (0,)})
