"""Patterns of heads: `held_to_the_laws(...)` knows one head's mask, so that several are checked beside it."""

import functools

import pytest

from attnlab import config as config_lib
from attnlab import masks, mixers
from attnlab.errors import ConfigError
from tests.masks import test_a_shape, test_grid_pattern, test_vertical_slash
from tests.masks.heads import each_has_its_own, in_a_layer
from tests.masks.laws import held_to_the_laws

A = {"name": "a_shape", "window": 4, "sinks": 2}
SLASH = {"name": "vertical_slash", "columns": (1, 6), "slashes": ((2, 5),)}
BANDS = {"name": "vertical_slash", "columns": (), "slashes": ((0, 1), (7, 9))}
GRID = {"name": "grid_pattern", "stride": 4, "phase": 1, "local": 3}
FAR = {"name": "grid_pattern", "stride": 3}
SEES = {
    "a_shape": test_a_shape.sees,
    "vertical_slash": test_vertical_slash.sees,
    "grid_pattern": test_grid_pattern.sees,
}


def of_head(node):
    """What the mask of that node shows by itself, by its definition."""
    return SEES[node.node_name]


def sees(config, n):
    return of_head(config.heads[0])(config.heads[0], n)


def test_laws():
    held_to_the_laws("per_head", sees, {"heads": (A,)}, {"heads": (SLASH,)}, {"heads": (FAR,)})


def test_each_head_has_its_own():
    nodes = (A, SLASH, GRID, BANDS, FAR, "a_shape")
    typed = [masks.config_from_node(node) for node in nodes]
    each_has_its_own({"name": "per_head", "heads": nodes}, [functools.partial(of_head(c), c) for c in typed])


def test_a_layer_takes_a_pattern_for_each_head():
    of = lambda *nodes: {"name": "per_head", "heads": nodes}
    in_a_layer(of(A, SLASH, GRID, BANDS), "heads")


def test_heads_are_named_on_the_command_line():
    text = "mask.heads=['a_shape', {'name': 'grid_pattern', 'stride': 7}]"
    tree = config_lib.apply_overrides({"name": "softmax", "heads": 2}, ["mask.name=per_head", text])
    config = mixers.config_from_node(tree)
    assert [head.node_name for head in config.mask.heads] == ["a_shape", "grid_pattern"]
    assert config.mask.heads[1].stride == 7
    assert mixers.config_from_node(config_lib.to_dict(config)) == config


@pytest.mark.parametrize(
    "heads, message",
    [
        ((), r"heads = \(\)"),
        ("a_shape", "heads = 'a_shape'.*a list"),
        (("a_shap",), r"heads\[0\].*a_shape"),
        (("a_shape", "power_blocks"), r"heads\[1\] = 'power_blocks'.*a_shape, grid_pattern, vertical_slash"),
        (({**SLASH, "block": 4},), r"heads\[0\].block = 4.*0"),
        (({**GRID, "strides": 4},), r"heads\[0\].strides"),
        (config_lib.Override("[1"), "a list"),
    ],
)
def test_refusals(heads, message):
    with pytest.raises(ConfigError, match=message):
        masks.build({"name": "per_head", "heads": heads})
