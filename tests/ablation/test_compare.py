"""Comparisons follow from runs by the plan's rules: pairs, failures, looks, Holm, and what is exploratory."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from attnlab.ablation import compare, statistics, synthetic
from attnlab.ablation.results import Metric, Run


def one(results, arm="b", metric="loss"):
    return next(c for c in compare.compare(results).comparisons if (c.arm, c.metric) == (arm, metric))


def changed(results, arm, seed, **kwargs):
    runs = [dataclasses.replace(r, **kwargs) if (r.arm, r.seed) == (arm, seed) else r for r in results.runs]
    return dataclasses.replace(results, runs=runs)


def replanned(results, **kwargs):
    return dataclasses.replace(results, plan=dataclasses.replace(results.plan, **kwargs))


def values(results, arm):
    return [run.final["loss"] for run in results.runs if run.arm == arm]


def test_pairs_are_by_seed():
    """Whatever the order of runs; every number is that of the statistics on these pairs."""
    results = synthetic.results({"a": 0.0, "b": -1.5, "c": 0.1}, 7, margin=0.5)
    shuffled = dataclasses.replace(results, runs=results.runs[::-1])
    assert compare.compare(shuffled).comparisons == compare.compare(results).comparisons
    c, d = one(results), statistics.paired(values(results, "b"), values(results, "a"))
    assert (c.n, c.pairs, c.missing, c.test, c.df) == (7, list(range(7)), [], "paired t", 6)
    assert (c.mean, c.sd, c.t, c.p, c.ci95) == (d.mean, d.sd, d.t, d.p, d.interval())
    assert (c.tost_p, c.mde80, c.margin) == (d.tost(0.5), d.detectable(), 0.5)
    both = np.subtract(values(results, "b"), values(results, "a"))
    assert (c.sign_flip_p, c.wilcoxon_p) == (statistics.sign_flip(both), statistics.wilcoxon(both))
    assert (c.look, c.planned, c.level) == (1, True, 0.05)


def test_holm_is_over_primary_comparisons():
    """(arms - 1) x primary metrics; secondary ones are neither counted nor adjusted; no test counts as p = 1."""
    results = synthetic.results({"a": 0.0, "b": -3.0, "c": -1.0}, 5)
    runs = [
        dataclasses.replace(r, final={**r.final, "x": -r.final["loss"], "y": 2 * r.final["loss"]}) for r in results.runs
    ]
    metrics = [Metric("loss"), Metric("x", "higher"), Metric("y", primary=False)]
    results = replanned(dataclasses.replace(results, runs=runs), metrics=metrics)
    found = compare.compare(results).comparisons
    primary = [c for c in found if c.primary]
    assert [(c.arm, c.metric) for c in primary] == [("b", "loss"), ("c", "loss"), ("b", "x"), ("c", "x")]
    assert [c.p_holm for c in primary] == statistics.holm([c.p for c in primary])
    assert [c.p_holm for c in found if not c.primary] == [None, None]
    assert one(results).verdict == one(results, metric="x").verdict == "better"
    constant = lambda r: {**r.final, "loss": {"a": 1.0, "b": 2.0}.get(r.arm, r.final["loss"])}
    flat = dataclasses.replace(results, runs=[dataclasses.replace(r, final=constant(r)) for r in runs])
    c = one(flat)
    assert c.p is None and c.p_holm is None and c.verdict == "inconclusive" and "are no repeats" in c.notes[0]
    ps = [1.0 if c.p is None else c.p for c in compare.compare(flat).comparisons if c.primary]
    assert one(flat, metric="x").p_holm == statistics.holm(ps)[2]


def test_a_failed_run_is_counted_not_dropped():
    """Failed and not-finite runs are out of the t test, in the failures, and the worst rank; missing ones are named."""
    results = synthetic.results({"a": 0.0, "b": -5.0}, 6)
    results = changed(results, "b", 1, status="failed", final={})
    results = changed(results, "b", 2, final={"loss": None})
    c = one(results)
    assert (c.n, c.pairs, c.missing) == (4, [0, 3, 4, 5], [])
    assert (c.failures.arm, c.failures.arm_runs, c.failures.baseline, c.failures.wins, c.failures.losses) == (
        2,
        6,
        0,
        4,
        2,
    )
    assert c.look == 1
    dropped = dataclasses.replace(results, runs=[r for r in results.runs if (r.arm, r.seed) != ("a", 0)])
    c = one(dropped)
    assert (c.pairs, c.missing, c.look, c.planned) == ([3, 4, 5], [0], None, False)
    assert one(changed(results, "b", 0, final={"other": 1.0})).missing == [0]  # done, without the figure


def test_other_devices_are_no_pairs():
    """A pair on two kinds of device is left out, and said."""
    c = one(changed(synthetic.results({"a": 0.0, "b": 0.0}, 4), "b", 2, device="gpu"))
    assert c.pairs == [0, 1, 3] and c.notes == ["seeds 2 are no pairs: they ran on gpu and None"]


def test_unpaired():
    """Welch's test on all runs, of which an arm may have more."""
    results = synthetic.results({"a": 0.0, "b": -4.0}, 6)
    fewer = dataclasses.replace(results, runs=[r for r in results.runs if (r.arm, r.seed) != ("b", 0)])
    c, d = one(replanned(fewer, paired=False)), statistics.unpaired(values(fewer, "b"), values(fewer, "a"))
    assert (c.test, c.n, c.pairs, c.p, c.ci95, c.r) == ("Welch", 5, [], d.p, d.interval(), None)
    assert c.sign_flip_p is None and c.wilcoxon_p is None and c.verdict == "better"


def test_seeds_that_do_not_pair():
    """Where arms anticorrelate over seeds Welch's p stands beside."""
    results = synthetic.results({"a": 0.0, "b": 0.0}, 4)
    opposed = lambda r: {"loss": (1 if r.arm == "a" else -1) * [1.0, 2.0, 3.0, 5.0][r.seed]}
    results = dataclasses.replace(results, runs=[dataclasses.replace(r, final=opposed(r)) for r in results.runs])
    c = one(results)
    assert c.r == pytest.approx(-1) and c.welch_p == statistics.unpaired(values(results, "b"), values(results, "a")).p
    assert one(synthetic.results({"a": 0.0, "b": 0.0}, 4, sd=0.1)).welch_p is None


def test_identical_arms():
    """Arms that differ in name only are identical, and not `equivalent`."""
    results = synthetic.results({"a": 0.0, "b": 0.0}, 5, margin=1.0)
    base = values(results, "a")
    c = one(
        dataclasses.replace(results, runs=[dataclasses.replace(r, final={"loss": base[r.seed]}) for r in results.runs])
    )
    assert (c.p, c.verdict, c.ci95, c.sd) == (1.0, "identical", [0.0, 0.0], 0.0)


def test_items():
    """Per-document differences, averaged over pairs: a bootstrap over documents beside the test over seeds."""
    rng = np.random.default_rng(0)
    results = synthetic.results({"a": 0.0, "b": 0.0}, 3)
    items = {(r.arm, r.seed): rng.normal(size=40).tolist() for r in results.runs}
    with_items = lambda n: dataclasses.replace(results, runs=[
        dataclasses.replace(r, items={"loss": items[r.arm, r.seed][:n]}) for r in results.runs
    ])  # fmt: skip
    d = np.mean([np.subtract(items["b", s], items["a", s]) for s in range(3)], axis=0)
    c = one(with_items(40)).items
    assert c.n == 40 and math.isclose(c.mean, d.mean()) and c.ci95 == statistics.over_examples(d)
    assert one(with_items(9)).items is None
    assert one(changed(with_items(40), "b", 1, items={"loss": items["b", 1][:30]})).items is None


# --- looks ------------------------------------------------------------------------------------------------------------


def partly(results, count):
    return dataclasses.replace(results, runs=[run for run in results.runs if run.seed < count])


def test_looks():
    """A look counts when all its runs have ended, at its own level and on its seeds alone; between looks is a peek."""
    results = synthetic.results({"a": 0.0, "b": -0.9}, 8, looks=[4, 8], seed=4)
    c = one(partly(results, 6))
    assert (c.look, c.n, c.pairs, c.level, c.planned) == (1, 4, [0, 1, 2, 3], 0.0294, True)
    assert (
        one(partly(results, 3)).look is None and not one(partly(results, 3)).planned and one(partly(results, 3)).n == 3
    )
    assert (one(results).look, one(results).n) == (2, 8)
    assert (
        one(partly(results, 6)).mde80
        > statistics.paired(values(results, "b")[:4], values(results, "a")[:4]).detectable()
    )
    between = next(
        r for i in range(300) if 0.0294 < one(r := synthetic.results({"a": 0.0, "b": -1.0}, 4, seed=i)).p < 0.05
    )
    assert one(between).verdict == "better"
    assert (
        one(replanned(between, stopping=dataclasses.replace(between.plan.stopping, level=0.0294))).verdict != "better"
    )


def test_seeds_due():
    """The next look's seeds, until every primary comparison is decided, by equivalence too, or the plan is through."""
    plain = synthetic.results({"a": 0.0, "b": 0.0}, 8, looks=[4, 8], seed=2)
    clear = synthetic.results({"a": 0.0, "b": -9.0}, 8, looks=[4, 8])
    close = synthetic.results({"a": 0.0, "b": 0.0}, 8, looks=[4, 8], margin=9.0, seed=2)
    one_clear = synthetic.results({"a": 0.0, "b": -9.0, "c": 0.0}, 8, looks=[4, 8], seed=2)
    assert compare.seeds_due(partly(plain, 0)) == compare.seeds_due(partly(plain, 3)) == [0, 1, 2, 3]
    assert compare.seeds_due(partly(plain, 4)) == compare.seeds_due(partly(one_clear, 4)) == [4, 5, 6, 7]
    for results in (clear, close):
        assert compare.seeds_due(partly(results, 4)) == []
    assert one(partly(close, 4)).verdict == "equivalent"
    assert compare.seeds_due(plain) == []


def test_head_to_head():
    """Any two arms, by the same rules."""
    results = synthetic.results({"a": 0.0, "b": -9.0, "c": -1.0}, 5)
    c = compare.head_to_head(results, "loss", "b", "c")
    assert c.baseline == "c" and c.verdict == "better" and c.mean == pytest.approx(-8, abs=2)


def test_no_runs():
    """A plan without runs has comparisons that say so."""
    c = one(dataclasses.replace(synthetic.results({"a": 0.0, "b": 0.0}, 3), runs=[Run("a", 0, "w", "missing")]))
    assert (c.n, c.mean, c.verdict, c.notes) == (0, None, "inconclusive", ["no runs can be compared"])
    assert c.missing == [0, 1, 2]
