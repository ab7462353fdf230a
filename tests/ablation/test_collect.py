"""`attnlab report` on workdirs: what is an arm, what is a pair, what is refused, what is read of a run."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from attnlab import config as config_lib
from attnlab.ablation import collect, compare, results_file, sections, synthetic
from attnlab.ablation.view import View
from attnlab.errors import UserError
from attnlab.train.config import RunConfig
from tests import tiers
from tests.train import runs

TASK = {"name": "icl_regression"}
REGRESSION = {
    "name": "regression",
    "inputs": 6,
    "width": 16,
    "layers": 1,
    "mixers": {"M": {"name": "softmax", "heads": 2}},
}


def fake(path, *, mixer="softmax", seed=0, loss=2.0, steps=12, end=None, device="cpu", digest="d0", **overrides):
    """A workdir as a run leaves it, made by hand."""
    overrides = {"model__mixers__M__name": mixer, **overrides}
    config = runs.config("text:/nowhere/*.py", seed=seed, train__steps=steps, **overrides)
    path.mkdir(parents=True)
    info = {
        "config": config_lib.to_dict(config), "git": {"commit": "abc"}, "versions": {"jax": "0"},
        "devices": {"platform": device, "kind": device}, "command": ["attnlab", "train", f"--seed={seed}"],
        "data": {"source": "x", "digest": digest}, "implementations": {"attention": {"s1": "xla", "s2": "xla"}},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(info))
    end = steps if end is None else end
    lines = []
    for step in range(1, end + 1):
        timed = {"step_seconds": None if step == 1 else 0.5, "tokens_per_second": None if step == 1 else 512.0}
        lines.append(
            {
                "step": step,
                "loss": loss + 1 / step,
                "tokens": 256 * step,
                **timed,
                "grad_norm": 1.0,
                "nonfinite": 0.0,
                "peak_bytes": 100 + step,
            }
        )
    for line in lines:
        if line["step"] % 6 == 0:
            line |= {
                "heldout_loss": loss + 0.1 / line["step"],
                "heldout_accuracy": 0.5,
                "heldout_accuracy/pairs=4": 0.25,
            }
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def two_arms(home, seeds=(0, 1, 2), **kwargs):
    return [
        fake(home / f"{mixer}{seed}", mixer=mixer, seed=seed, loss=loss + 0.01 * seed * seed, **kwargs)
        for mixer, loss in (("softmax", 2.0), ("gated", 1.5)) for seed in seeds
    ]  # fmt: skip


def test_arms_and_pairs(tmp_path):
    """Configs that differ in the seed alone are one arm, named by what differs; runs of a seed are pairs."""
    paths = two_arms(tmp_path)
    results = compare.compare(collect.collect(paths[::-1], baseline="softmax"))
    plan = results.plan
    assert (list(plan.arms), plan.baseline, plan.seeds, plan.hash) == (["softmax", "gated"], "softmax", [0, 1, 2], None)
    assert plan.arms["softmax"].config_diff == {}
    assert plan.arms["gated"].config_diff == {"model.mixers.M.name": ["softmax", "gated"]}  # no knob at its default
    (c,) = results.comparisons
    assert (c.arm, c.n, c.pairs, c.planned, c.look) == ("gated", 3, [0, 1, 2], False, 1)
    assert c.mean == pytest.approx(-0.5)
    for baseline in (str(paths[3]), "gated"):
        assert collect.collect(paths, baseline=baseline).plan.baseline == "gated"
    assert [run.arm for run in collect.collect([tmp_path]).runs] == ["gated"] * 3 + ["softmax"] * 3  # as sorted
    assert results_file.from_json(results_file.to_json(results)) == results


def test_what_is_read_of_a_run(tmp_path):
    """Curve, final figures, cost, implementations and samples are those of the files."""
    paths = two_arms(tmp_path, seeds=(0,))
    samples = "=== step {} · prompt ===\nab\n=== continuation ===\n{}\n\n"
    (paths[0] / "samples.txt").write_text(
        samples.format(6, "old") + samples.format(12, "c=== d") + samples.format(12, "e")
    )
    run = collect.collect(paths).runs[0]
    assert (run.status, run.tokens, run.seconds, run.commit, run.device) == ("done", 3072, 6.0, "abc", "cpu")
    assert run.curve["step"] == list(range(1, 13)) and run.curve["seconds"][:3] == [0.5, 1.0, 1.5]
    assert [v for v in run.curve["heldout_loss"] if v is not None] == [2.0 + 0.1 / 6, 2.0 + 0.1 / 12]
    assert run.final == {"heldout_loss": 2.0 + 0.1 / 12, "heldout_accuracy": 0.5, "loss": 2 + 1 / 12}
    assert run.diagnostics == {"grad_norm": 1.0} and run.impl == {"attention": "xla"}
    assert [s.text for s in run.samples] == ["c=== d", "e"]
    config = config_lib.build(RunConfig, json.loads((paths[0] / "config.json").read_text())["config"])
    cost = collect.model_cost(config.model, config.data.length)
    assert (run.cost.parameters, run.cost.state_bytes) == (cost.parameters, cost.state_bytes)
    assert run.curve["flops"][-1] == 3072 * 3 * cost.total_flops
    assert run.cost.tokens_per_second == 512 and run.cost.peak_bytes == 100 + run.curve["step"][-1]


def test_how_runs_ended(tmp_path):
    """Killed runs are missing, those whose gradients were not finite failed; a last line that was cut off is none."""
    paths = two_arms(tmp_path, seeds=(0, 1, 2, 3))
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in paths]
    (paths[1] / "metrics.jsonl").write_text("\n".join(lines[1][:7]) + "\n" + lines[1][7][:20])
    (paths[2] / "metrics.jsonl").write_text(
        "\n".join([*lines[2][:7], lines[2][7].replace('finite": 0.0', 'finite": 3.0')]) + "\n"
    )
    (paths[3] / "metrics.jsonl").write_text("\n".join([*lines[3][:11], '{"step": 12, "loss": null}']) + "\n")
    (paths[5] / "metrics.jsonl").unlink()
    results = collect.collect(paths)
    found = {(run.arm, run.seed): (run.status, run.reason) for run in results.runs}
    assert found["softmax", 0] == found["gated", 0] == ("done", None)
    assert found["softmax", 1] == ("missing", "step 7 of 12") and found["gated", 1] == ("missing", "step 0 of 12")
    assert next(run for run in results.runs if (run.arm, run.seed) == ("softmax", 1)).final == {}  # of no last step
    assert found["softmax", 2] == ("failed", "gradients were not finite, and the run ended at step 8 of 12")
    assert found["softmax", 3] == ("failed", "the loss is not finite at step 12")
    (c,) = compare.compare(results).comparisons
    assert (c.n, c.missing, c.failures.baseline, c.look) == (1, [1], 2, None)


def test_tasks(tmp_path):
    """Held-out figures of generated data by slice, with chance and oracle as the run logged them."""
    paths = []
    for seed, width in ((0, 16), (0, 32)):
        tree = {"seed": seed, "data": TASK, "model": {**REGRESSION, "width": width}, "optimizer": {"name": "adamw"}}
        config = config_lib.build(RunConfig, {**tree, "train": {"steps": 6}})
        paths.append(tmp_path / str(width))
        paths[-1].mkdir()
        (paths[-1] / "config.json").write_text(json.dumps({"config": config_lib.to_dict(config)}))
        first = {"step": 1, "loss": 1.0, "tokens": 9, "chance_accuracy": 0.1, "oracle_accuracy": 1.0}
        last = {"step": 6, "loss": 1.0, "tokens": 54, "heldout_loss": 0.3, "heldout_accuracy": 0.5}
        last |= {"heldout_accuracy/pairs=4": 0.75}
        (paths[-1] / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (first, last)))
    results = collect.collect(paths, metric="icl_regression/accuracy/pairs=4")
    figure = results.runs[0].tasks["icl_regression"]["accuracy"]
    assert (figure.value, figure.slices, figure.better) == (0.5, {"pairs=4": 0.75}, "higher")
    assert (figure.chance, figure.oracle) == (0.1, 1.0)
    assert results.plan.metrics[0].direction == "higher" and list(results.plan.arms) == ["width=16", "width=32"]
    assert "chance_accuracy" not in results.runs[0].diagnostics
    assert collect.collect(paths).runs[0].tasks["icl_regression"]["loss"].better == "lower"


def test_names_of_arms(tmp_path):
    """Few keys that differ name the arms; many leave it to the workdirs."""
    plain = [fake(tmp_path / "p", optimizer__learning_rate=1e-3), fake(tmp_path / "q", optimizer__learning_rate=2e-3)]
    assert list(collect.collect(plain).plan.arms) == ["learning_rate=0.001", "learning_rate=0.002"]
    many = fake(
        tmp_path / "r", optimizer__learning_rate=3e-3, optimizer__clip=2.0, data__shuffle=False, model__width=32
    )
    assert list(collect.collect([plain[0], many], paired=False).plan.arms) == ["p", "r"]


def test_difference():
    """Keys that both have, and what one alone has where it is not at its default, in nodes inside nodes, too."""
    softmax = {"name": "softmax", "heads": 2}
    make = lambda mixer, **kwargs: runs.config("text:/nowhere/*.py", model__mixers={"M": mixer}, **kwargs)
    before = make(softmax)
    assert collect.difference(before, make({**softmax, "window": 8})) == {"model.mixers.M.window": [None, 8]}
    gated = collect.difference(before, make({"name": "gated", "heads": 2, "position": "G2"}, model__dropout=0.5))
    names = {"model.mixers.M.name": ["softmax", "gated"], "model.mixers.M.position": ["-", "G2"]}
    assert gated == {"model.dropout": [0.0, 0.5], **names}
    inner = collect.difference(before, make({"name": "moh", "heads": 2, "core": {**softmax, "window": 8}}))
    assert inner["model.mixers.M.core.window"] == ["-", 8] and "model.mixers.M.core.sinks" not in inner


def test_a_key_that_tells_two_apart_is_told_of_all(tmp_path):
    """A table of values by arm shows what each arm has: `-` where its mixer knows no such key."""
    mixers = {"a": ("gated", {"position": "G2"}), "b": ("gated", {}), "c": ("softmax", {})}
    paths = [
        fake(tmp_path / name, model__mixers={"M": {"name": mixer, "heads": 2, **knobs}}, mixer=mixer)
        for name, (mixer, knobs) in mixers.items()
    ]  # fmt: skip
    table = sections.differences(View(collect.collect(paths)))
    assert table == {"model.mixers.M.name": ["gated", "gated", "softmax"], "model.mixers.M.position": ["G2", "G1", "-"]}


@pytest.mark.parametrize(
    "kwargs, parts",
    [
        ({"digest": "d1"}, ["data: digest: 'd0' -> 'd1'"]),
        ({"device": "gpu"}, ["device: 'cpu cpu' -> 'gpu gpu'"]),
        ({"data__batch": 16}, ["data.batch: 8 -> 16"]),
        ({"data__length": 64}, ["data.length: 32 -> 64"]),
        ({"train__eval_batches": 3}, ["train.eval_batches: 2 -> 3"]),
        ({"seed": 5}, ["(seeds [5])", "(seeds [0])", "no seed in common"]),
    ],
)
def test_no_pairs(tmp_path, kwargs, parts):
    """Runs that saw other data, were evaluated on other data or ran elsewhere are no pairs, unless it is said."""
    paths = [fake(tmp_path / "a"), fake(tmp_path / "b", mixer="gated", **{"loss": 1.0, **kwargs})]
    with pytest.raises(UserError) as caught:
        collect.collect(paths)
    for part in [*parts, "--unpaired"]:
        assert part in str(caught.value)
    results = compare.compare(collect.collect(paths, paired=False))
    assert results.comparisons[0].test == "Welch" and not results.plan.paired


def test_what_changes_no_number_is_no_arm(tmp_path):
    """Runs that log or save at other steps are of one arm."""
    paths = [fake(tmp_path / "a"), fake(tmp_path / "b", seed=1, train__log_every=2, train__keep=5)]
    with pytest.raises(UserError, match="of one config, but for seeds: there is nothing to compare"):
        collect.collect(paths)


@pytest.mark.parametrize(
    "args, parts",
    [
        (["nowhere"], ["nowhere is not there", "attnlab train"]),
        (["empty"], ["empty holds no run"]),
        (["softmax0", "gated0", "softmax0"], ["softmax0 is given twice"]),
        (["softmax0", "gated0", "again"], ["softmax0 and", "again are of one config and seed (0)"]),
        (["softmax0", "gated0", "--baseline", "gatd"], ["--baseline 'gatd'", "did you mean 'gated'", "softmax, gated"]),
        (
            ["softmax0", "gated0", "--metric", "heldout_los"],
            ["'heldout_los'", "did you mean 'heldout_loss'", "allowed:"],
        ),
        (["softmax0", "gated0", "--metrc", "x"], ["'--metrc'", "did you mean '--metric'"]),
        (["softmax0", "gated0", "--config.seed=1"], ["--config.seed=1"]),
        (["softmax0", "damaged"], ["config.json", "is damaged"]),
        (["softmax0", "later"], ["later is of another version", "unknown key 'model.wdth'"]),
        (["softmax0", "lines"], ["metrics.jsonl is damaged: line 3"]),
        (["softmax0", "gated0", "--out", "softmax0/config.json"], ["cannot be written"]),
        (["early0", "early1"], ["none of 2 runs is complete", "step 3 of 12"]),
        ([], ["DIR"]),
    ],
)
def test_refused(attnlab, tmp_path, monkeypatch, args, parts):
    """One to three lines say what to change, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    two_arms(tmp_path, seeds=(0,))
    (tmp_path / "empty").mkdir()
    fake(tmp_path / "again")
    for i, mixer in enumerate(("softmax", "gated")):
        fake(tmp_path / f"early{i}", mixer=mixer, end=3)
    for name in ("damaged", "later", "lines"):
        fake(tmp_path / name, mixer="gated")
    (tmp_path / "damaged/config.json").write_text("{")
    text = (tmp_path / "later/config.json").read_text()
    (tmp_path / "later/config.json").write_text(text.replace('"width"', '"wdth"', 1))
    lines = (tmp_path / "lines/metrics.jsonl").read_text().splitlines()
    (tmp_path / "lines/metrics.jsonl").write_text("\n".join([*lines[:2], "{,", *lines[3:]]) + "\n")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = attnlab("report", *args)
    assert (code, out) == (2, "") and 1 <= len(err.splitlines()) <= 3 and "Traceback" not in err, (code, out, err)
    for part in parts:
        assert part in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_verb(attnlab, tmp_path):
    """Says what differs and the comparison, writes the files, makes the page anew; --json is one object."""
    paths, out = two_arms(tmp_path / "runs"), tmp_path / "new" / "out"
    code, text, err = attnlab("report", *paths, "--out", out)
    assert (code, err) == (0, "") and "exploratory" in text and f"wrote {out / 'report.html'}" in text
    assert re.search(r"config keys that differ\nkey +softmax +gated\n", text) and "model.mixers.M.name" in text
    assert {p.name for p in out.iterdir()} == {"results.json", "results.csv", "report.html"}
    results = results_file.read(out / "results.json")
    page = (out / "report.html").read_bytes()
    assert page.index(b"What differs") < page.index(b"Result<")
    (out / "report.html").unlink()
    code, text, _ = attnlab("report", out)
    assert code == 0 and (out / "report.html").read_bytes() == page
    code, text, _ = attnlab("report", out, "--metric", "loss")
    assert code == 2
    code, text, _ = attnlab("report", tmp_path / "runs", "--out", out, "--baseline", "softmax", "--json")
    said = json.loads(text)
    assert code == 0 and said["comparisons"][0]["mean"] == results.comparisons[0].mean
    code, text, _ = attnlab("report", "--help")
    assert code == 0 and all(flag in text for flag in ("--out", "--baseline", "--metric", "--unpaired", "exploratory"))


def test_other_results_are_not_replaced(attnlab, tmp_path):
    """Neither a plan's nor a file that no report wrote; its own are."""
    paths = two_arms(tmp_path / "runs", seeds=(0,))
    for name, content, part in (
        ("results.json", results_file.to_json(synthetic.results({"a": 0.0, "b": 0.0}, 2)), "the results of a plan"),
        ("results.json", "{}", "schema = None"), ("report.html", "<p>", "of no report"),
    ):  # fmt: skip
        out = tmp_path / f"out{len(content)}"
        out.mkdir()
        (out / name).write_text(content)
        code, _, err = attnlab("report", *paths, "--out", out)
        assert code == 2 and part in err and "Traceback" not in err
        assert (out / name).read_text() == content and len(list(out.iterdir())) == 1
    assert [attnlab("report", *paths, "--out", tmp_path / "own")[0] for _ in range(2)] == [0, 0]


@tiers.exhaustive
def test_runs_of_the_trainer(attnlab, tmp_path):
    """What `train` leaves is read as it is: two mixers, two seeds, on real text."""
    source, paths = runs.corpus(tmp_path / "corpus"), []
    for mixer in ("softmax", "lightning"):
        for seed in (0, 1):
            paths.append(pathlib.Path(tmp_path / f"{mixer}{seed}"))
            mixers = {"M": {"name": mixer, "heads": 2}}
            small = {"train__steps": 4, "train__eval_every": 2, "train__log_every": 2, "model__layers": 1}
            runs.run(runs.config(source, seed=seed, model__mixers=mixers, **small), paths[-1])
    results = compare.compare(collect.collect(paths))
    assert all(run.status == "done" and run.impl and run.cost.parameters for run in results.runs)
    last = [runs.lines(path)[-1] for path in paths]
    assert [run.final["heldout_loss"] for run in results.runs] == [line["heldout_loss"] for line in last]
    (c,) = results.comparisons
    assert c.n == 2 and c.p is not None and c.verdict in ("better", "worse", "inconclusive")
    assert attnlab("report", *paths, "--out", tmp_path / "out")[0] == 0
