"""Every mask that configs can name has a test file, and its knobs are documented."""

import dataclasses
import pathlib

import pytest

from attnlab import masks
from attnlab.errors import ConfigError, UserError


@pytest.mark.parametrize("name", masks.names())
def test_every_mask_is_held_to_the_laws(name):
    text = (pathlib.Path(__file__).parent / f"test_{name}.py").read_text()
    assert "held_to_the_laws(" in text and f'"{name}"' in text
    for field in dataclasses.fields(masks.get(name).Config):
        assert field.metadata["doc"] and field.metadata["other"], field.name
    docs = (pathlib.Path(__file__).parents[2] / "docs" / "masks.md").read_text()
    assert f"`{name}`" in docs
    assert masks.get(name).paper


def test_a_wrong_node_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="power_block.*power_blocks"):
        masks.build("power_block")
    with pytest.raises(UserError, match="block = 0"):
        masks.build({"name": "power_blocks", "block": 0})
