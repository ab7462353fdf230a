"""Spans of heads: `held_to_the_laws(...)` knows one head's mask, so that several are checked beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks, mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.sequence import Sequence
from tests.masks.laws import SEGMENTS, held_to_the_laws
from tests.mixers import cases


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
    """Packed rows: head by head the mask of a single span; and the mean over heads is declared."""
    config = {"name": "spans", "spans": (1, 4, 9), "sinks": 1}
    builder = masks.build(config)
    made = jax.jit(lambda segments: builder.mask(Sequence(jnp.zeros_like(segments), segments).derived(), causal=True))
    mask = jax.tree.map(np.asarray, made(SEGMENTS))
    T = SEGMENTS.shape[1]
    seen = mask.visible(T, T)
    for h, width in enumerate((1, 4, 9)):
        alone = masks.build({"name": "spans", "spans": (width,), "sinks": 1})
        one = jax.jit(lambda s, b=alone: b.mask(Sequence(jnp.zeros_like(s), s).derived(), causal=True))(SEGMENTS)
        np.testing.assert_array_equal(seen[:, h], jax.tree.map(np.asarray, one).visible(T, T)[:, 0])
    whole = builder.mask(Sequence.whole(1, 20), causal=True)
    np.testing.assert_allclose(builder.span(20, causal=True), whole.visible(20, 20).sum(-1).mean())


def test_a_layer_takes_a_span_for_each_head():
    """Streams in pieces are the whole; another number of spans than heads is refused, by name."""
    node = {"name": "softmax", "heads": 4, "kv_heads": 2, "mask": {"name": "spans", "spans": (1, 2, 3, 9), "sinks": 1}}
    with jax.enable_x64(True):
        module = cases.module(mixers.config_from_node(node), jnp.float64)
        x, seq = cases.inputs(jnp.float64)
        whole = np.asarray(jax.jit(lambda x: module(x, seq).y)(x))
        state = jax.jit(lambda: module.init_state(2, cases.LENGTH, jnp.float64))()
        y, _ = cases.streamed(jax.jit(module.extend), state, x, seq, [4, 7])
        used = np.asarray(seq.segments) > 0
        np.testing.assert_allclose(y[used], whole[used], atol=1e-12)
    wrong = mixers.config_from_node({**node, "mask": {"name": "spans", "spans": (1, 2, 3)}})
    with pytest.raises(UserError, match="3"):
        jax.eval_shape(lambda *given: cases.module(wrong, jnp.float32)(*given).y, *cases.inputs(jnp.float32))
    with pytest.raises(ConfigError, match=r"spans = \(0,\)"):
        masks.build({"name": "spans", "spans": (0,)})
