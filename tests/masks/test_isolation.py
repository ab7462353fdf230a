"""Isolated subjects: `held_to_the_laws(...)` of other masks knows no subjects, so that they are checked here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.sequence import Sequence
from attnlab.ops.mask_tiles import tile_kinds
from attnlab.ops.masks import Mask
from tests.masks.laws import SEGMENTS, TILINGS, sound


def sees(config, q, k):
    known = 0 <= q < config.subjects and 0 <= k < config.subjects
    return known and (q == k or (config.background and 0 in (q, k)))


@pytest.mark.parametrize("background, causal", [(True, False), (False, True)])
def test_laws(background, causal):
    builder = masks.build({"name": "isolation", "subjects": 3, "background": background})
    B, T = SEGMENTS.shape
    node = np.random.default_rng(0).integers(-1, 4, (B, T)).astype(np.int32)
    expected = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        same = SEGMENTS[b, t] == SEGMENTS[b, s] != 0 and (s <= t or not causal)
        expected[b, t, s] = same and sees(builder.config, node[b, t], node[b, s])

    @jax.jit
    def made(segments, node):
        seq = Sequence(jnp.zeros_like(segments), segments, node=node).derived()
        cut = jax.tree.map(lambda x: x[:, 7:12], seq)
        index = jnp.arange(7, 12, dtype=jnp.int32)[None]
        interval = Mask(jnp.where(cut.segments == 0, index + 1, index - cut.offsets), index + 1)
        return builder.mask(seq, causal=causal), builder.rows(cut, builder.coordinates(seq), interval)

    mask, rows = jax.tree.map(np.asarray, made(SEGMENTS, node))
    np.testing.assert_array_equal(mask.visible(T, T)[:, 0], expected)
    for bq, bk in TILINGS:
        sound(tile_kinds(mask, T, T, bq, bk), expected[:, None], bq, bk)
    if causal:
        np.testing.assert_array_equal(rows.visible(5, T)[:, 0], expected[:, 7:12])
    whole = builder.mask(Sequence(np.zeros((1, T), np.int32), node=node[:1]), causal=causal)
    assert whole.known()


def test_subjects_must_be_given():
    builder = masks.build("isolation")
    with pytest.raises(UnsupportedPattern, match="Sequence.node"):
        builder.require(Sequence.whole(1, 4), causal=True)
    with pytest.raises(UnsupportedPattern, match="Sequence.layout"):
        masks.build("concentric").require(Sequence.whole(1, 4), causal=True)
