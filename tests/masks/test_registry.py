"""Every mask that configs can name has a test file, and its knobs are documented."""

import dataclasses
import pathlib

import numpy as np
import pytest

from attnlab import masks
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.sequence import Sequence


@pytest.mark.parametrize("name", masks.names())
def test_every_mask_is_held_to_the_laws(name):
    text = (pathlib.Path(__file__).parent / f"test_{name}.py").read_text()
    assert "held_to_the_laws(" in text and f'"{name}"' in text
    for field in dataclasses.fields(masks.get(name).Config):
        assert field.metadata["doc"] and field.metadata["other"], field.name
    docs = (pathlib.Path(__file__).parents[2] / "docs" / "masks.md").read_text()
    assert f"`{name}`" in docs
    assert masks.get(name).paper


FAR = 2**30 - 1  # the farthest that a knob which is added to positions may reach


@pytest.mark.parametrize(
    "near",
    [
        {"name": "a_shape", "window": 12, "sinks": 0},
        {"name": "a_shape", "window": 1, "sinks": 12},
        {"name": "spans", "spans": (1, 2), "sinks": 12},
        {"name": "grid_pattern", "stride": 3, "phase": 12, "local": 1},
        {"name": "grid_pattern", "stride": 3, "local": 12},
    ],
    ids=lambda node: "-".join(map(str, node.values())),
)
def test_a_knob_as_large_as_it_may_be(near):
    """Beyond the row's length a larger one shows the same, and no sum with a position leaves int32; more is refused."""
    n, key = 12, next(k for k, v in near.items() if v == 12)
    far = {**near, key: FAR}
    for causal in (True, False):
        at, beyond = masks.build(near), masks.build(far)
        if getattr(at, "causal" if causal else "bidirectional"):
            seen = [mask.mask(Sequence.whole(1, n), causal=causal).visible(n, n) for mask in (at, beyond)]
            np.testing.assert_array_equal(*seen)
            assert at.span(n, causal=causal) == beyond.span(n, causal=causal)
    with pytest.raises(ConfigError, match=f"{key} = {FAR + 1}.*below {FAR + 1}"):
        masks.build({**near, key: FAR + 1})


def test_a_wrong_node_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="power_block.*power_blocks"):
        masks.build("power_block")
    with pytest.raises(UserError, match="block = 0"):
        masks.build({"name": "power_blocks", "block": 0})
