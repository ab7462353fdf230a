"""Plans whose arms begin as another run: which checkpoint that was is part of the plan."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from attnlab import config as config_lib
from attnlab.ablation import announce, beginnings, gather, plan, schedule, worker
from attnlab.ablation.plan import PlanConfig
from attnlab.ablation.state import Log
from attnlab.errors import UserError
from attnlab.train import loop, restore
from attnlab.train.state import flat
from tests.ablation import plans
from tests.train import runs


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A workdir with checkpoints of steps 2 and 3."""
    path = tmp_path_factory.mktemp("trained") / "v"
    few = {
        "model__mlp_width": 64,
        "train__steps": 3,
        "train__save_every": 1,
        "train__eval_every": 0,
        "train__sample_tokens": 0,
    }
    loop.train(runs.config(source, **few), path)
    return path


def resolved(source, **changes):
    tree = plans.tree(source, **changes)
    tree["base"]["train"] |= {"steps": 3, "eval_every": 3, "save_every": 3}
    config = config_lib.build(PlanConfig, tree)
    return config, beginnings.pinned(plan.cells(config))


def params(path, step):
    return {name: np.asarray(leaf) for name, leaf in flat(restore.load(path, str(step)).params).items()}


def test_arms_begin_as_weights(source, trained, tmp_path):
    """The plan's run or the arm's own, by step and digest; a newer checkpoint is not looked at. What of it fits is
    taken as by any run (tests/train/test_beginning.py), so that the arms are of one program."""
    v = shutil.copytree(trained, tmp_path / "v")
    arms = {"plain": {}, "rows": {"data.shuffle": False}, "drawn": {"init_from": None}}
    config, made = resolved(source, arms=arms, init_from=str(v))
    known = {"place": str(v), "step": 3, "digest": made[0].begins["digest"]}
    assert [cell.begins for cell in made] == [known, known, None]
    work = tmp_path / "plan"
    first = announce.announce(config, made, work, print)
    tree = json.loads((work / announce.NAME).read_text())
    assert tree["others"]["rows"]["begins"] == known and first.cells == made
    shutil.copytree(v / "checkpoints" / "3", v / "checkpoints" / "4")
    worker.work(worker.Part(str(work)))
    assert all(Log(work).read().status(f"arms/{arm}/seed{seed}") == "done" for arm in arms for seed in (0, 1))
    wanted = params(trained, 3)
    for arm in ("plain", "rows"):
        begun = json.loads((work / "arms" / arm / "seed1" / "init_from.json").read_text())
        assert (begun["step"], begun["dropped"], begun["kept"]) == (3, [], [])
        found = params(work / "arms" / arm / "seed1", 0)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert not (work / "arms/drawn/seed0/init_from.json").exists()
    results = gather.collect(announce.read(work), work)
    assert any(f"begins as {v} at step 3" in note for note in results.plan.arms["rows"].notes)
    assert results.plan.arms["plain"].command.endswith(f" --init-from {v}")


def test_arms_learn_of_a_checkpoint(source, trained):
    """A teacher is pinned as what arms begin as is, and both are in the plan's hash."""
    taught = {"train.distill": {"teacher": str(trained)}}
    config, made = resolved(source, arms={"plain": {}, "taught": taught | {"init_from": str(trained)}})
    known = {"place": str(trained), "step": 3, "digest": made[1].begins["digest"]}
    assert [(cell.begins, cell.teacher) for cell in made] == [(None, None), (known, known)]
    assert made[1].config().train.distill.step == 3
    others = plan.announced(config, made)["others"]
    assert others == {"taught": {"begins": known, "teacher": known}}


def test_the_digest_is_part_of_the_plan(source, trained, tmp_path):
    """Another checkpoint is another plan, and a run that finds another one under the same step does not begin."""
    digest = lambda **changes: plan.digest(plan.announced(*resolved(source, **changes)))
    assert digest() != digest(init_from=str(trained)) == digest(init_from=str(trained))
    v = shutil.copytree(trained, tmp_path / "v")
    config, made = resolved(source, init_from=str(v))
    work = tmp_path / "plan"
    announce.announce(config, made, work, print)
    run = schedule.planned(config, made)[0]
    pinned = beginnings.of({**made[0].begins, "digest": "0" * 64})
    assert run.cell.begins["step"] == 3
    with pytest.raises(UserError, match="its checkpoint of step 3 has the digest .* and had 000000000000 when it was"):
        loop.train(run.config(), tmp_path / "w", init_from=pinned)
    shutil.rmtree(v / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"holds another plan.*others.plain.begins.step: 3 -> 2"):
        announce.announce(*resolved(source, init_from=str(v)), work, print)


@pytest.mark.parametrize("changes, message", [
    ({"arms": {"a": {}, "b": {"model.width": 32}}}, r"arm 'b': init_from = .* does not fit model.*\[260, 32\]"),
    ({"arms": {"a": {}, "b": {"init_from": "nowhere"}}}, r"arm 'b': init_from = .*nowhere holds no run"),
    ({"arms": {"a": {}, "b": {"init_from": 3}}}, r"arms.b.init_from = 3 is not possible; allowed: a workdir, or none"),
    ({"arms": {"a": {}, "b": {"train.distill.teacher": "nowhere"}}}, r"arm 'b': train.distill.teacher = .* no run"),
])  # fmt: skip
def test_refused(source, trained, changes, message):
    """Before anything runs, with the arm's name."""
    with pytest.raises(UserError, match=message):
        resolved(source, init_from=str(trained), **changes)


def test_what_is_solved_for_must_fit(source, trained):
    """Equal parameters by another MLP is another shape than the weights'."""
    made = resolved(source, arms={"a": {}, "b": {"model.mixers.M": "gated"}}, init_from=str(trained),
                    equal={"what": "parameters", "multiple": 1})  # fmt: skip
    with pytest.raises(UserError, match=r"arm 'b': init_from = .* does not fit model"):
        announce.solve(*made, print)
