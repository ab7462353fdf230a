"""Isolated subjects."""

import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab import masks, mixers
from attnlab.errors import ConfigError, UnsupportedPattern
from attnlab.mixers.sequence import Sequence
from tests.masks.nodes import held_to_the_laws


def sees(config, q, k):
    known = 0 <= q < config.subjects and 0 <= k < config.subjects
    if config.allowed is not None:
        return known and config.allowed[q][k]
    return known and (q == k or (config.background and 0 in (q, k)))


@pytest.mark.parametrize("background", [True, False])
def test_laws(background):
    held_to_the_laws("isolation", sees, {"subjects": 3, "background": background}, 3)


# The background sees all; subject 1 is seen by subject 2 and does not see it; no subject sees the background.
ONE_WAY = ((True, True, True), (False, True, False), (False, True, True))


def test_who_sees_whom_as_a_table():
    """A rule that goes one way, held to the laws; the rules by name are tables of it; from a command line, too."""
    held_to_the_laws("isolation", sees, {"subjects": 3, "allowed": ONE_WAY}, 3)
    table = lambda **knobs: masks.build({"name": "isolation", "subjects": 3, **knobs}).table()
    assert table(allowed=ONE_WAY).tolist() == [list(row) for row in ONE_WAY]
    for background in (True, False):
        named = table(background=background)
        np.testing.assert_array_equal(table(allowed=named.tolist()), named)
    tree = {"name": "softmax", "causal": False, "mask": {"name": "isolation"}}
    config_lib.apply_overrides(tree, ["mask.subjects=3", f"mask.allowed={ONE_WAY}"])
    assert mixers.config_from_node(tree).mask.allowed == ONE_WAY


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"allowed": ONE_WAY}, r"allowed = .*4 rows of 4 truth values \(subjects = 4\), or none"),
        ({"subjects": 2, "allowed": ((True,), (True, False))}, "allowed = .*2 rows of 2"),
        ({"subjects": 3, "allowed": ONE_WAY, "background": False}, "background = False.*true, the default"),
        ({"subjects": 1, "allowed": ((1,),)}, "allowed = .*wrong type"),
    ],
)
def test_tables_that_are_none(knobs, message):
    with pytest.raises(ConfigError, match=message):
        masks.build({"name": "isolation", **knobs})


def test_subjects_must_be_given():
    builder = masks.build("isolation")
    with pytest.raises(UnsupportedPattern, match="Sequence.node"):
        builder.require(Sequence.whole(1, 4), causal=True)
    with pytest.raises(UnsupportedPattern, match="Sequence.layout"):
        masks.build("concentric").require(Sequence.whole(1, 4), causal=True)
