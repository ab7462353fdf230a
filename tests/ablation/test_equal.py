"""What is held equal: solved on the real models' costs."""

from __future__ import annotations

import pytest

from attnlab import config as config_lib
from attnlab import mixers
from attnlab.ablation import equal, plan
from attnlab.ablation.plan import PlanConfig
from attnlab.errors import ConfigError
from tests import tiers

METRICS = {"heldout_loss": {"primary": True}}


def base(width=128, layers=4, **mixer):
    mixer = {"name": "softmax", "heads": 4, **mixer}
    return {
        "data": {"source": "stdlib", "tokenizer": "bytes", "length": 64, "batch": 8},
        "model": {"vocab": 272, "width": width, "layers": layers, "mixers": {"M": mixer}},
        "optimizer": {"name": "adamw"},
        "train": {"steps": 100},
    }  # fmt: skip


def solved(arms, what, tree=None, **more):
    """The cells of a plan at equal costs, by name."""
    asked = {"question": "q", "base": tree or base(), "arms": arms, "metrics": METRICS, "equal": {"what": what, **more}}
    config = config_lib.build(PlanConfig, asked)
    return equal.solve(config, plan.cells(config), more.pop("seconds", None))


FEW = ["softmax", "gated", "mamba2"]
CAUSAL = [name for name in mixers.names() if mixers.get(name).capabilities.causal]


@tiers.parametrize("names", [FEW, CAUSAL], often=[FEW], ids=["few", "all"])
def test_every_mixer_within_a_per_cent_of_softmax(names):
    """At width 128 and 4 layers each mixer has softmax's parameters within 1 %, by its MLP's width alone."""
    names = ["softmax", *(n for n in names if n != "softmax")]
    found = solved({n: {"model.mixers.M": {"name": n}} for n in names}, "parameters")
    count = lambda s: (cost := equal.cost_of(s.cell)).parameters - cost.embedding_parameters
    target = count(found["softmax"])
    for name, s in found.items():
        assert abs(count(s) / target - 1) <= 0.01 and abs(s.residual) <= 1, name
        assert set(s.values) <= {"model.mlp_width"} and all(v % 8 == 0 for v in s.values.values())
    assert found["softmax"].values == {} and found["gated"].values


def test_the_nearest_value_is_found():
    """No other multiple is nearer, whichever way the cost goes with the knob."""
    arms = {"softmax": {}, "gated": {"model.mixers.M": {"name": "gated"}}}
    s = solved(arms, "parameters", multiple=2)["gated"]
    for near in (-2, 2):
        other = s.cell.with_values({"model.mlp_width": s.values["model.mlp_width"] + near})
        assert abs(s.residual) <= abs(100 * (equal.cost_of(other).parameters / equal.cost_of(s.cell).parameters - 1))
    # RAT's state shrinks as its chunks grow.
    state = {"softmax": {"model.mixers.M.window": 8}, "rat": {"model.mixers.M": {"name": "rat", "heads": 4}}}
    s = solved(state, "state_bytes", knobs={"rat": "model.mixers.M.chunk"}, multiple=1, tolerance=15)["rat"]
    assert s.values["model.mixers.M.chunk"] > 1 and abs(s.residual) <= 15


def test_tokens_flops_and_seconds():
    """Steps are solved for: half the batch takes twice the steps, a dearer arm fewer, a slower one fewer."""
    half = {"a": {}, "b": {"data.batch": 4}}
    assert solved(half, "tokens")["b"].values == {"train.steps": 200}
    arms = {"a": {}, "b": {"model.layers": 8}}
    found = solved(arms, "flops", knob="train.steps")
    s, flops = found["b"], lambda name: equal.cost_of(found[name].cell).total_flops
    ratio = flops("a") / flops("b")
    assert s.values["train.steps"] == round(100 * ratio) < 100
    config = config_lib.build(PlanConfig, {
        "question": "q", "base": base(), "arms": arms, "metrics": METRICS, "equal": {"what": "seconds"},
    })  # fmt: skip
    assert equal.solve(config, plan.cells(config), {"a": 0.1, "b": 0.25})["b"].values == {"train.steps": 40}


def test_an_mlp_that_gives_a_third_is_told():
    """The report says so where the MLP has shrunk by more than a third."""
    tree = base(width=32, layers=2)
    wide = {"a": {}, "b": {"model.mixers.M": {"name": "gated_deltanet", "heads": 2, "head_width": 32, "expand": 1.0}}}
    s = solved(wide, "parameters", tree=tree, multiple=1)["b"]
    assert s.notes and "less than two thirds" in s.notes[0]


@pytest.mark.parametrize(
    "arms, more, says",
    [
        ({"a": {}, "b": {"train.steps": 50}}, {"what": "steps"}, "arm 'b' has train.steps = 50"),
        (
            {"a": {}, "b": {"model.layers": 1}},
            {"what": "parameters", "knob": "model.mlp_width", "multiple": 512},
            "% off",
        ),
        ({"a": {}, "b": {"model.layers": 1}}, {"what": "parameters", "knob": "model.mlp"}, "unknown key"),
        ({"a": {"model.mixers.M": {"name": "softmax", "heads": 4}}, "b": {}}, {"what": "parameters"}, "same config"),
    ],
)
def test_refused(arms, more, says):
    """What cannot be made equal is refused with the nearest value and how far off it is."""
    with pytest.raises(ConfigError) as error:
        solved(arms, more.pop("what"), tree=base(width=32, layers=2), **more)
    assert says in str(error.value)
