"""results.json is strict, comes back as it was, and is refused where it is not whole; results.csv has every figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest

from attnlab.ablation import results_file
from attnlab.ablation.results import Arm, Figure, Metric, Plan, Results, Run, Stopping
from attnlab.errors import UserError
from tests.ablation import showcase


def small(**kwargs):
    plan = Plan("which?", "a", {"a": Arm(), "b": Arm()}, [0, 1], [Metric("loss")], Stopping([2]))
    tasks = {"mqar": {"accuracy": Figure(0.5, 64, {"pairs=4": 0.75, "pairs=8": math.nan})}}
    runs = [
        Run("a", 0, "w", "done", final={"loss": 0.1 + 0.2, "other": math.inf}, tasks=tasks),
        Run("b", 0, "v", "failed"),
    ]
    return Results(**{"plan": plan, "runs": runs, **kwargs})


def test_round_trip():
    """Every field of results with every part comes back, at full precision."""
    for results in (showcase.results(), small(created="now", checks={"identical_arms": True})):
        text = results_file.to_json(results)
        again = results_file.from_json(text)
        assert results_file.to_json(again) == text
    assert again.runs[0].final == {"loss": 0.1 + 0.2, "other": None}  # what is not finite is null
    assert results_file.from_json(results_file.to_json(showcase.results())) == showcase.results()


def test_strict_json(tmp_path):
    """No bare NaN, numpy's numbers as numbers, any text, ASCII bytes, replaced in one step."""
    run = Run("a", np.int64(0), 'w\ud800"</script>', "done", final={"loss": np.float32(0.5), "n": np.nan})
    results_file.write(tmp_path / "results.json", small(runs=[run]))
    content = (tmp_path / "results.json").read_bytes().decode("ascii")
    tree = json.loads(content, parse_constant=lambda word: pytest.fail(word))
    assert tree["schema"] == 1 and tree["runs"][0]["final"] == {"loss": 0.5, "n": None}
    assert results_file.read(tmp_path / "results.json").runs[0].workdir == run.workdir
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def edited(path, value):
    tree = json.loads(results_file.to_json(small()))
    *parents, last = path
    here = tree
    for key in parents:
        here = here[key]
    if value is None:
        del here[last]
    else:
        here[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("{", ["no strict JSON"]),
        ("[1]", ["schema = None", "allowed: 1"]),
        (edited(["schema"], 2), ["schema = 2", "allowed: 1"]),
        (edited(["plan", "seeds"], "01"), ["results.plan.seeds = '01'", "a list"]),
        (edited(["plan", "seeds"], [0, 0]), ["plan.seeds", "each once"]),
        (edited(["plan", "baseline"], "c"), ["plan.baseline = 'c'", "a, b"]),
        (edited(["plan", "margins"], {"loss": -1.0}), ["plan.margins.loss = -1.0", "above 0"]),
        (edited(["plan", "margins"], {"los": 1.0}), ["plan.margins = 'los'", "loss"]),
        (edited(["plan", "metrics", 0, "direction"], "down"), ["direction = 'down'", "lower, higher"]),
        (edited(["plan", "stopping", "looks"], [1]), ["looks = [1]", "all 2 seeds"]),
        (edited(["plan", "question"], None), ["results.plan.question", "no default"]),
        (edited(["runs", 0, "sed"], 3), ["results.runs[0].sed = 3", "arm, seed"]),
        (edited(["runs", 0, "seed"], True), ["results.runs[0].seed = True", "an integer"]),
        (edited(["runs", 0, "seed"], 7), ["runs[0].seed = 7", "0, 1"]),
        (edited(["runs", 0, "arm"], "b"), ["runs[1]", "one run of an arm and a seed"]),
        (edited(["runs", 0, "status"], "ok"), ["status = 'ok'", "done, failed, missing"]),
        (edited(["runs", 0, "curve"], {"loss": [1.0]}), ["curve", "`step` among them"]),
        (edited(["runs", 0, "curve"], {"step": [1], "loss": []}), ["curve", "one length"]),
        (edited(["runs", 0, "final", "loss"], "1"), ["results.runs[0].final.loss = '1'", "a finite number"]),
        (results_file.to_json(small()).replace('"other": null', '"other": NaN'), ["NaN is no JSON number"]),
        (results_file.to_json(small()).replace('"other": null', '"other": 1e999'), ["final.other = inf", "finite"]),
    ],
)  # fmt: skip
def test_refused(tmp_path, text, parts):
    """The file, the key, the value and what is allowed are named."""
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError) as caught:
        results_file.read(tmp_path / "results.json")
    for part in [str(tmp_path), *parts]:
        assert part in str(caught.value)


def test_not_there(tmp_path):
    """A missing file, a directory and bytes that are no text are said as such."""
    (tmp_path / "b").write_bytes(b'{"schema": "\xff"}')
    for name, part in (("a", "is not there"), (".", "is a directory"), ("b", "no UTF-8")):
        with pytest.raises(UserError, match=part):
            results_file.read(tmp_path / name)


def test_csv():
    """One row per arm, seed, metric and slice; commas and quotes survive; a run without figures has a row."""
    plan = dataclasses.replace(small().plan, baseline='a,"1"', arms={'a,"1"': Arm(), "b": Arm()})
    runs = [dataclasses.replace(small().runs[0], arm='a,"1"'), small().runs[1]]
    rows = list(csv.reader(io.StringIO(results_file.to_csv(small(plan=plan, runs=runs)))))
    assert rows == [
        ["arm", "seed", "status", "metric", "slice", "value"],
        ['a,"1"', "0", "done", "loss", "", "0.30000000000000004"],
        ['a,"1"', "0", "done", "other", "", ""],
        ['a,"1"', "0", "done", "mqar/accuracy", "", "0.5"],
        ['a,"1"', "0", "done", "mqar/accuracy", "pairs=4", "0.75"],
        ['a,"1"', "0", "done", "mqar/accuracy", "pairs=8", ""],
        ["b", "0", "failed", "", "", ""],
    ]
