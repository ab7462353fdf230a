"""A kind of thing that configs choose by name is whole when it is registered."""

import subprocess
import sys

import pytest
from flax import nnx

from attnlab.data.base import Data
from attnlab.mixers.base import Mixer
from attnlab.mixers.heads import HeadConfig, HeadMixer
from attnlab.models.objective import Objective
from attnlab.registry import Registry
from attnlab.tasks.base import Task, TaskConfig


class Config:
    """Of nothing."""


@pytest.mark.parametrize(
    "base, config, missing",
    [
        (Mixer, Config, "__call__, __init__, flops"),
        (HeadMixer, HeadConfig, "flops, heads"),
        (Objective, Config, "__init__, batch_spec, cost, evaluate, loss, summarize"),
        (Data, Config, "describe, heldout, training"),
        (Task, TaskConfig, "example, facts, Config.batch_spec, Config.fitting, Config.length"),
    ],
)
def test_what_a_class_leaves_out_is_said_when_it_is_registered(base, config, missing):
    """Not when a run first asks for it; and what is whole is taken."""
    registry = Registry("thing")
    with pytest.raises(TypeError, match=f"thing 'half' does not define {missing}$"):
        registry.register("half")(type("Half", (base,), {"Config": config}))
    assert registry.names() == []


def test_what_is_whole_is_registered():
    whole = {"Config": Config, "__init__": lambda self: None, "__call__": lambda self, x, seq: x, "flops": nnx.vmap}
    registry = Registry("thing")
    assert registry.register("whole")(type("Whole", (Mixer,), whole)).name == "whole" and registry.names() == ["whole"]


def test_what_a_config_names_is_all_that_is_imported():
    """A mixer by its name without the others, which come when all are asked for; tasks by the names of their files or
    by none of them."""
    code = """
import sys
from attnlab import config, data, mixers
from attnlab.data.base import KINDS
there = lambda name: f"attnlab.{name}" in sys.modules
assert config.read_file("configs/lm.py:mixer=gated")["model"]["mixers"]["M"]["name"] == "gated"
assert mixers.get("gated").name == "gated" and there("mixers.gated") and not there("mixers.titans")
assert KINDS.get("text").name == "text" and not there("tasks.mqar")
assert KINDS.get("mqar").name == "mqar" and there("tasks.mqar") and not there("tasks.words")
assert "reverse" not in KINDS and there("tasks.words")
assert set(mixers.names()) > {"gated", "titans"} and there("mixers.titans")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_module_that_fails_is_told_to_everyone(tmp_path, monkeypatch):
    """Names are never a part of them; what can be imported by its own name is."""
    package = tmp_path / "things_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", ["things_of_a_test"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            registry.names()
