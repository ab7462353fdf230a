"""Isolated subjects."""

import pytest

from attnlab import masks
from attnlab.errors import UnsupportedPattern
from attnlab.mixers.sequence import Sequence
from tests.masks.nodes import held_to_the_laws


def sees(config, q, k):
    known = 0 <= q < config.subjects and 0 <= k < config.subjects
    return known and (q == k or (config.background and 0 in (q, k)))


@pytest.mark.parametrize("background", [True, False])
def test_laws(background):
    held_to_the_laws("isolation", sees, {"subjects": 3, "background": background}, 3)


def test_subjects_must_be_given():
    builder = masks.build("isolation")
    with pytest.raises(UnsupportedPattern, match="Sequence.node"):
        builder.require(Sequence.whole(1, 4), causal=True)
    with pytest.raises(UnsupportedPattern, match="Sequence.layout"):
        masks.build("concentric").require(Sequence.whole(1, 4), causal=True)
