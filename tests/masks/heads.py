"""Masks of which every head has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks, mixers
from attnlab.errors import ConfigError
from attnlab.mixers.sequence import Sequence as Row
from attnlab.ops import mask_tiles
from tests.masks.laws import ODD, SEGMENTS, TILINGS, by_documents, packed, sound
from tests.mixers import cases


def each_has_its_own(node: dict[str, Any], sees: Sequence[Callable[[int], np.ndarray]]) -> None:
    """Head by head whole and packed rows are the causal part of `sees[h](n)`, bool [n, n]; tiles are sound; the mean
    over heads is declared."""
    builder, n = masks.build(node), 30
    mask = builder.mask(Row.whole(1, n), causal=True)
    assert mask.known() and mask.heads() == len(sees)
    expected = np.stack([np.tril(of(n)) for of in sees])[None]
    np.testing.assert_array_equal(mask.visible(n, n), expected)
    np.testing.assert_allclose(builder.span(n, causal=True), expected.sum(-1).mean(), rtol=1e-12)
    for segments in (SEGMENTS, ODD):
        mask, T = packed(builder, True, segments), segments.shape[1]
        expected = np.stack([by_documents(lambda n, of=of: np.tril(of(n)), segments) for of in sees], 1)
        np.testing.assert_array_equal(mask.visible(T, T), expected)
        for bq, bk in TILINGS:
            sound(mask_tiles.tile_kinds(mask, T, T, bq, bk), expected, bq, bk)


def in_a_layer(mask: dict[str, Any], knob: str) -> None:
    """Of 4 query heads over 2: streams in pieces are the whole; the config takes 4 masks in `knob` or 1, and no other
    number, that of the key heads included."""
    node = {"name": "softmax", "heads": 4, "kv_heads": 2}
    for name in ("softmax", "gated"):
        layer = lambda count, name=name: {**node, "name": name, "mask": {**mask, knob: mask[knob][:1] * count}}
        for count in (1, 4):
            assert len(getattr(mixers.config_from_node(layer(count)).mask, knob)) == count
        for count in (2, 3, 5):
            message = rf"mask.{knob} = .*the 4 query heads \(heads = 4\), or one for all, not {count}$"
            with pytest.raises(ConfigError, match=message):
                mixers.config_from_node(layer(count))
    with pytest.raises(ConfigError, match=rf"core: mask.{knob} = .*heads = 8.*not 4"):
        mixers.config_from_node({"name": "moh", "heads": 8, "core": {"name": "softmax", "mask": mask}}, "mixer")
    with jax.enable_x64(True):
        module = cases.module(mixers.config_from_node({**node, "mask": mask}), jnp.float64)
        x, seq = cases.inputs(jnp.float64)
        whole = np.asarray(jax.jit(lambda x: module(x, seq).y)(x))
        state = jax.jit(lambda: module.init_state(2, cases.LENGTH, jnp.float64))()
        y, _ = cases.streamed(jax.jit(module.extend), state, x, seq, [4, 7])
        used = np.asarray(seq.segments) > 0
        np.testing.assert_allclose(y[used], whole[used], atol=1e-12)
