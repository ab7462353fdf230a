"""Hybrids by name, `configs/lm.py:preset=NAME`: layers, widths and states as their authors published them."""

from __future__ import annotations

import importlib.util

import pytest

from attnlab import config as config_lib
from attnlab.errors import ConfigError
from attnlab.mixers import get
from attnlab.train.config import RunConfig
from tests.train.runs import ROOT

LM = "configs/lm.py"


def presets():
    spec = importlib.util.spec_from_file_location("lm", ROOT / LM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return sorted(module.PRESETS)


# Of each letter: how many layers, and bytes of a layer's state for a sequence of 4096, bfloat16, the overflow flag out.
KEPT = {
    "based_360m": {
        "C": (17, 2 * 2048 * 2),
        "B": (5, 16 * 153 * (64 + 1) * 4),
        "W": (5, 2 * 16 * 64 * 128 * 2),
    },
    "infinitevl": {"W": (9, 2 * 2 * 128 * 4096 * 2), "M": (27, 16 * 128 * 256 * 4 + 3 * 16 * (128 + 128 + 256) * 2)},
    "kimi_linear": {"K": (20, 32 * 128 * 128 * 4 + 3 * 32 * 3 * 128 * 2), "L": (7, 4096 * (512 + 64) * 2)},
    "qwen3_next": {
        "M": (36, 32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2),
        "G": (12, 2 * 2 * 256 * 4096 * 2),
    },
}


def test_all_are_held():
    assert presets() == sorted(KEPT)


@pytest.mark.parametrize("name", presets())
def test_layers_and_states(name):
    """As many layers of each kind as published, and what a stream holds of each."""
    model = config_lib.load(RunConfig, f"{LM}:preset={name}").model
    letters = "".join(model.blocks) * (model.layers // len(model.blocks))
    for letter, (count, state) in KEPT[name].items():
        mixer = model.mixers[letter]
        cost = get(mixer.node_name).cost(mixer, model.width, 4096, model.compute_dtype)
        assert letters.count(letter) == count
        assert abs(cost.state_bytes - state) <= 16, (letter, cost.state_bytes, state)
    assert len(letters) == sum(count for count, _ in KEPT[name].values())


# Added to the mean square in the stream's norms, and of a delta rule's heads; published code scales its queries.
NORMS = {"infinitevl": (1e-6, "M", 1e-5), "kimi_linear": (1e-5, "K", 1e-5), "qwen3_next": (1e-6, "M", 1e-6)}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_queries_and_norms(name):
    """As published: an epsilon weighs d times as much after queries that are divided by sqrt(d)."""
    model = config_lib.load(RunConfig, f"{LM}:preset={name}").model
    stream, letter, own = NORMS[name]
    mixer = model.mixers[letter]
    assert (model.norm_epsilon, mixer.norm_epsilon, mixer.query_scale) == (stream, own, None)


def test_a_preset_stands_alone():
    """What it says already is refused beside it, by name; and so is one that is not there."""
    with pytest.raises(ConfigError, match="size = 'micro'.* nano beside preset=kimi_linear"):
        config_lib.load(RunConfig, f"{LM}:preset=kimi_linear,size=micro")
    with pytest.raises(ConfigError, match="preset = 'kimi'.*kimi_linear"):
        config_lib.load(RunConfig, f"{LM}:preset=kimi")
