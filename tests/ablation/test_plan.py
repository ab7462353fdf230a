"""Plans are checked before anything runs, and announced once."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest

from attnlab import config as config_lib
from attnlab.ablation import announce, calibrate, plan, price
from attnlab.ablation.plan import PlanConfig
from attnlab.errors import ConfigError, UserError
from tests import tiers
from tests.ablation import plans
from tests.train.runs import ROOT, corpus


def cells(**changes):
    config = config_lib.build(PlanConfig, plans.tree("stdlib", **changes))
    return config, plan.cells(config)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"arms": {"a": {}}}, "two or more"),
        ({"arms": {"a": {}, "b": {}}}, "arms 'a' and 'b' have the same config"),
        ({"arms": {"a": {}, "b": {"model.width": 16}}}, "arms 'a' and 'b' have the same config"),
        ({"arms": {"a": {}, "b": {"model.wdth": 8}}}, "arm 'b': unknown key 'model.wdth'"),
        ({"arms": {"a": {}, "b": {"model.mixers.M.heads": 3}}}, "arm 'b': "),
        ({"arms": {"a": {}, "b": {"seed": 3}}}, "seeds are the plan's"),
        ({"arms": {"a/b": {}, "b": {"model.width": 8}}}, "letters, digits"),
        ({"baseline": "plan"}, "did you mean 'plain'"),
        ({"seeds": [0, 0]}, "different numbers"),
        ({"metrics": {"heldout_loss": {}}}, "primary"),
        ({"metrics": {"heldout_loss": {"primary": True, "direction": "up"}}}, "direction"),
        ({"tuning": {"rates": [0.1, 0.2]}}, "three learning rates"),
        ({"tuning": {"rates": [0.1, 0.2, 0.5]}}, "geometric"),
        ({"tuning": {"rates": [0.1, 0.2, 0.4], "seeds": [1]}}, "seeds that are not reported"),
        ({"looks": [1, 2]}, "no known level"),
        ({"looks": [3]}, "the last at all 2 seeds"),
        ({"equal": {"what": "width"}}, "equal.what"),
        ({"equal": {"what": "tokens", "knob": "model.width"}}, "train.steps"),
        ({"base": "nowhere.py"}, "base: 'nowhere.py' is not there"),
        ({"tasks": {"t": {}}, "metrics": {"heldout_loss": {"primary": True}}}, "TASK/METRIC of t"),
        ({"arms": {"a": {}, "b": {"train.eval_every": 0}}}, "train.eval_every = 0"),
    ],
)
def test_refused(changes, says):
    """What cannot be is refused with its key, its value and what is allowed."""
    with pytest.raises(UserError) as error:
        cells(**changes)
    assert says in str(error.value)


def test_cells():
    """Overrides are a task's, then an arm's; a name picks a thing, a node replaces it; offsets make arms differ."""
    config, made = cells(
        arms=[{"model.mixers.M": "gated"}, {"model.mixers.M": {"name": "flow"}}],
        tasks={"short": {"data.length": 16}, "long": {}},
        metrics={"short/heldout_loss": {"primary": True}, "long/heldout_loss": {}},
    )
    assert [c.name for c in made] == ["M=gated/short", "M=flow/short", "M=gated/long", "M=flow/long"]
    assert [c.tree["data"]["length"] for c in made] == [16, 16, 32, 32]
    assert made[0].tree["model"]["mixers"]["M"]["heads"] == 2  # kept
    assert config.leading("long")[0] == "heldout_loss" and list(config.metrics_of("short")) == ["heldout_loss"]
    _, same = cells(arms={"a": {}, "b": {"seed_offset": 100}})
    assert same[0].tree == same[1].tree and same[1].seed_offset == 100


def test_the_hash_is_of_what_is_asked():
    """Everything that a run computes, a comparison uses or a rule says changes it; nothing else does."""
    digest = lambda **changes: plan.digest(plan.announced(*cells(**changes)))
    first = digest()
    assert first == digest(baseline="plain") == digest(equal={"what": "steps"})
    others = [
        digest(seeds=[0, 2]), digest(question="Does it?"), digest(arms={"plain": {}, "gate": {"model.width": 32}}),
        digest(metrics={"heldout_loss": {"primary": True, "margin": 0.2}}), digest(equal={"what": "parameters"}),
    ]  # fmt: skip
    assert len({first, *others}) == 6


def test_announced_once(tmp_path):
    """plan.json holds what was solved for; the same plan is read back, another is refused with what differs."""
    source, work = corpus(tmp_path / "text"), tmp_path / "plan"
    make = lambda **changes: config_lib.build(PlanConfig, plans.tree(source, **changes))
    equal = {"what": "parameters", "multiple": 1}
    config = make(equal=equal)
    told = []
    first = announce.announce(config, plan.cells(config), work, told.append)
    assert first.tree["solved"]["set"]["gate"] and first.config.arms == config.arms
    assert dataclasses.replace(first.config, base=config.base, baseline=None) == config
    again = announce.announce(config, plan.cells(config), work, told.append)
    assert again.tree == first.tree and [c.tree for c in again.cells] == [c.tree for c in first.cells]
    other = make(equal=equal, seeds=[0, 5])
    with pytest.raises(UserError, match=r"holds another plan.*seeds"):
        announce.announce(other, plan.cells(other), work, told.append)
    with pytest.raises(UserError, match="something else"):
        announce.announce(config, plan.cells(config), tmp_path / "text", told.append)
    wrong = make(metrics={"heldout_los": {"primary": True}})
    with pytest.raises(ConfigError, match="did you mean 'heldout_loss'"):
        announce.announce(wrong, plan.cells(wrong), tmp_path / "new", told.append)
    assert not (tmp_path / "new").exists()


def test_the_plan_of_the_docs(tmp_path):
    """docs/ablations.md: its plan is one."""
    (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/ablations.md").read_text(), re.M | re.S)
    (tmp_path / "plan.py").write_text(text.replace("configs/lm.py", f"{ROOT}/configs/lm.py"))
    config, made = announce.load(str(tmp_path / "plan.py"), [])
    assert len(made) == len(config.arms) * len(config.tasks)
    assert announce.load(str(tmp_path / "plan.py"), ["seeds=[4,5]"])[0].seeds == (4, 5)


PLANS = sorted((ROOT / "configs/ablations").rglob("*.py"))


@tiers.parametrize("path", PLANS, often=[ROOT / "configs/ablations/quick.py"], ids=lambda path: path.stem)
def test_the_plans_of_configs(path):
    """Each file of configs/ablations is a plan."""
    config, made = announce.load(str(path), [])
    assert len(made) == len(config.arms) * len(config.tasks)


CLAIMS = sorted((ROOT / "configs/ablations/claims").glob("*.py"))


@tiers.exhaustive
@tiers.parametrize("path", CLAIMS, often=CLAIMS[:1], ids=lambda path: path.stem)
def test_a_claim_has_a_rule_and_a_price(path, tmp_path, monkeypatch):
    """Every plan in claims says when its claim is supported and when refuted; its figures are there, what it solves for
    can be, and its price is stated. Steps are not timed here, nothing compiles."""
    told = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    assert told.startswith("Claim:") and "supported if" in told.lower() and "refuted if" in told.lower()
    monkeypatch.setattr(calibrate, "step_seconds", lambda cells, steps: {cell.name: 0.01 for cell in cells})
    config, made = announce.load(str(path), [])
    priced = price.price(config, made, tmp_path / "work", 1, lambda text: None)
    assert priced["runs"] >= len(made) * len(config.seeds) and price.summary(priced)
    assert priced["hours"] > 0 and min(row["tokens"] for row in priced["arms"]) > 0
    assert not (tmp_path / "work").exists()
