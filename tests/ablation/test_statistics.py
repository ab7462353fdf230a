"""Statistics agree with SciPy and with numbers worked out by hand, and say nothing where there is too little to say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from attnlab.ablation import compare, statistics, synthetic
from attnlab.errors import UserError
from tests import tiers

D = [0.02, 0.01, 0.03, 0.015, 0.02]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(2.0, 0.1, n), rng.normal(2.05, 0.08, n)


def test_worked_example():
    """The t test, interval and equivalence of five differences, to the digits in which they were worked out."""
    found = statistics.paired(D, np.zeros(5))
    assert (round(found.mean, 6), round(found.sd, 7), round(found.t, 4)) == (0.019, 0.0074162, 5.7287)
    assert round(found.p, 4) == 0.0046
    assert [round(bound, 4) for bound in found.interval()] == [0.0098, 0.0282]
    assert float(f"{found.tost(0.05):.1e}") == 3.6e-4
    close(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 16])
def test_paired_is_scipy(n):
    """t, p, interval, both one-sided tests and r are SciPy's."""
    a, b = pairs(n)
    ours, theirs = statistics.paired(a, b), stats.ttest_rel(a, b)
    close([ours.t, ours.p, ours.df, *ours.interval()],
          [theirs.statistic, theirs.pvalue, theirs.df, *theirs.confidence_interval()])  # fmt: skip
    for margin in (0.01, 0.2):
        above = stats.ttest_1samp(a - b, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(a - b, margin, alternative="less").pvalue
        close(ours.tost(margin), max(above, below))
        low, high = ours.interval(0.90)
        assert (ours.tost(margin) < 0.05) == (-margin < low and high < margin)
    if n > 2:
        close(statistics.correlation(a, b), stats.pearsonr(a, b).statistic)


def test_welch_is_scipy():
    """With different numbers of runs and different spreads."""
    a, b = pairs(8)[0], pairs(5, 1)[1] * 3
    ours, theirs = statistics.unpaired(a, b), stats.ttest_ind(a, b, equal_var=False)
    close([ours.t, ours.p, ours.df, *ours.interval()],
          [theirs.statistic, theirs.pvalue, theirs.df, *theirs.confidence_interval()])  # fmt: skip
    assert (ours.n, ours.test) == (5, "Welch")


@pytest.mark.parametrize("n, half_width, effect", [(3, 2.48, 3.26), (4, 1.59, 2.13), (5, 1.24, 1.68), (8, 0.84, 1.16)])
def test_detectable_effect(n, half_width, effect):
    """In units of sd: the published table; and at that effect the noncentral t rejects with 0.8 to 1e-12."""
    d = np.resize([1.0, -1.0, 0.5], n)
    d = d / d.std(ddof=1)
    found = statistics.paired(d - d.mean(), np.zeros(n))
    low, high = found.interval()
    assert round((high - low) / 2, 2) == half_width
    assert abs(found.detectable() - effect) < 0.0051
    critical, nc = stats.t.ppf(0.975, n - 1), found.detectable() * math.sqrt(n)
    close(stats.nct.sf(critical, n - 1, nc) + stats.nct.cdf(-critical, n - 1, nc), 0.8)
    assert found.detectable(level=0.0294) > found.detectable() > found.detectable(power=0.5)


def test_holm_is_the_definition():
    """Against the step-down procedure itself: reject in order of p while p_(k) <= level / (m - k + 1)."""
    rng = np.random.default_rng(0)
    for m, level in itertools.product((1, 2, 5, 9), (0.01, 0.05, 0.3)):
        p = rng.uniform(0, 0.2, m)
        rejected, order = set(), np.argsort(p)
        for k, i in enumerate(order):
            if p[i] > level / (m - k):
                break
            rejected.add(int(i))
        assert {i for i, q in enumerate(statistics.holm(p)) if q <= level} == rejected


def test_exact_tests():
    """Sign flips against all patterns written out; Wilcoxon against SciPy; both with ties and with a zero."""
    d = np.array([0.3, 0.2, 0.1, -0.1, 0.4, 0.3, 0.0])
    signs = np.array(list(itertools.product([1, -1], repeat=len(d))))
    share = lambda values: float(np.mean(np.abs(signs[:, : len(values)] @ values) >= abs(values.sum()) - 1e-12))
    close(statistics.sign_flip(d), share(d))
    kept = d[d != 0]
    close(statistics.wilcoxon(d), share(np.sign(kept) * stats.rankdata(np.abs(kept))))
    assert statistics.wilcoxon([0.31, 0.2, 0.11, -0.1, 0.4, 0.0]) is None  # five that are not 0
    untied = np.array([0.31, 0.2, 0.11, -0.1, 0.4, 0.3])
    close(statistics.wilcoxon(untied), stats.wilcoxon(untied, method="exact").pvalue)
    close(statistics.sign_flip(np.arange(1, 9)), 2 / 2**8)
    assert 0 < statistics.sign_flip(np.linspace(-1, 2, 20)) < 0.1  # too many to try all


@pytest.mark.parametrize("n", range(1, 10))
def test_too_few(n):
    """Ranks and sign patterns cannot reach 5 % below six; seeds are never bootstrapped below ten; one run has no t."""
    d = np.arange(1.0, n + 1)
    assert (statistics.sign_flip(d) is None) == (statistics.wilcoxon(d) is None) == (n < 6)
    if n >= 6:
        assert statistics.sign_flip(d) <= 0.05
    else:
        assert 2 / 2**n > 0.05
    with pytest.raises(UserError, match=f"{n} seeds are too few for a bootstrap; allowed: 10 or more"):
        statistics.over_seeds(d)
    with pytest.raises(UserError, match="examples"):
        statistics.over_examples(d)
    found = statistics.paired(d, np.zeros(n))
    assert (found.p is None) == (found.interval() is None) == (found.detectable() is None) == (n == 1)


def test_bootstrap_over_examples():
    """BCa as SciPy's, whose interval of a skewed sample is not symmetric; of a constant, the constant."""
    d = np.random.default_rng(3).exponential(1.0, 200)
    low, high = statistics.over_examples(d)
    theirs = stats.bootstrap((d,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose([low, high], [theirs.low, theirs.high], rtol=1e-9)
    assert high - d.mean() > d.mean() - low > 0
    assert statistics.over_examples(np.full(12, 0.25)) == [0.25, 0.25]
    assert statistics.over_seeds(d[:10])[0] < d[:10].mean()


def test_spearman():
    """SciPy's rho; an interval only from ten arms on; nothing of a figure that does not vary."""
    x, y = np.arange(12.0), np.array([0, 2, 1, 4, 3, 5, 7, 6, 9, 8, 11, 10.0])
    found = statistics.spearman(x, y)
    close([found.rho, found.p], [stats.spearmanr(x, y).statistic, stats.spearmanr(x, y).pvalue])
    assert found.ci95[0] < found.rho < found.ci95[1] <= 1
    assert statistics.spearman(x[:9], y[:9]).ci95 is None and statistics.spearman(x[:9], y[:9]).rho > 0.8
    assert statistics.spearman(x, np.ones(12)).rho is None and statistics.spearman([1, 2], [1, 2]).rho is None


def test_failures_are_the_worst_rank():
    """Fisher's table, and the sign test in which a failure loses to anything and ties with a failure."""
    arm, base = [1.0, None, None, 2.0, 3.0], [2.0, 1.0, None, 1.0, 4.0]
    found = statistics.failures(arm, base, list(zip(arm, base)), "lower")
    assert (found.arm, found.arm_runs, found.baseline, found.baseline_runs) == (2, 5, 1, 5)
    assert (found.wins, found.losses) == (2, 2)
    assert (statistics.failures(arm, base, list(zip(arm, base)), "higher").wins) == 1
    close(found.fisher_p, stats.fisher_exact([[2, 3], [1, 4]]).pvalue)
    close(found.sign_p, stats.binomtest(2, 4).pvalue)
    assert statistics.failures([1.0], [2.0], [(1.0, 2.0)], "lower") is None
    assert statistics.failures([None], [None], [(None, None)], "lower").sign_p is None


@pytest.mark.parametrize("direction, better", [("lower", -1), ("higher", 1)])
def test_verdicts(direction, better):
    """Every word by its rule, with either end good."""
    rule = {"direction": direction, "margin": 0.05}
    noise = np.array([0.01, -0.01, 0.005, -0.005, 0.0])
    of = lambda d, p=None, **kwargs: statistics.verdict(
        found := statistics.paired(d, np.zeros(len(d))), found.p if p is None else p, **{**rule, **kwargs}
    )
    assert of(better * (0.2 + noise)) == "better" and of(-better * (0.2 + noise)) == "worse"
    assert of(better * (0.02 + noise)) == "trivially better" and of(-better * (0.02 + noise)) == "trivially worse"
    assert of(better * (0.02 + noise), margin=None) == "better"
    assert of(better * (0.045 + noise)) == "better"  # the mean is inside the margin, the interval is not
    assert of(noise, margin=0.0085) == "equivalent" and of(noise, margin=0.0065) == "inconclusive"  # p .037 and .07
    assert of(noise) == "equivalent" and of(noise, margin=None) == "inconclusive"
    assert of(better * (0.2 + noise), p=0.06) == "inconclusive"  # adjusted away
    assert of(better * (0.2 + noise), p=0.03, level=0.0294) == "inconclusive"
    assert of(10 * noise) == "inconclusive"
    assert of(np.zeros(3)) == "identical" and of(np.zeros(1)) == "inconclusive"


def test_differences_that_do_not_vary():
    """Arms that are the same have p = 1; a constant difference is no test: seeds that change nothing repeat nothing."""
    same = statistics.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.p, same.interval(), same.same) == (1.0, [0.0, 0.0], True)
    shifted = statistics.paired([0.1 + 0.2, 1.3, 2.3], [0.1, 1.1, 2.1])  # 0.2 but for rounding
    assert shifted.sd == 0 and shifted.p is None and shifted.interval() is None and not shifted.same
    assert statistics.verdict(shifted, None, direction="lower") == "inconclusive"
    flat = statistics.unpaired([1.0, 1.0], [2.0, 2.0])
    assert flat.p is None and flat.mean == -1
    assert statistics.correlation([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize("call", [
    lambda: statistics.paired([1.0], [1.0, 2.0]),
    lambda: statistics.paired([], []),
    lambda: statistics.unpaired([1.0, math.nan], [1.0, 2.0]),
    lambda: statistics.sign_flip([math.inf]),
    lambda: statistics.spearman([1, 2, 3], [1, 2]),
])  # fmt: skip
def test_refused(call):
    """Numbers that no test can take are an error, not NaN."""
    with pytest.raises(UserError):
        call()


def test_sequential_designs():
    """Only designs whose level is known."""
    level = lambda *looks: statistics.stopping(looks).level
    assert (level(5), level(4, 8), level(3, 6, 9), level(3, 5)) == (0.05, 0.0294, 0.0221, 0.025)
    for looks in ([3, 4, 5, 6, 8, 10], [8, 4], [], [0]):
        with pytest.raises(UserError, match="no known level; allowed: one look at any number, or \\(4, 8\\)"):
            statistics.stopping(looks)


# --- simulations: fixed seeds, thousands of plans through the code that users run -------------------------------------


def test_level_of_null_plans():
    """2,000 plans of identical arms at five seeds: a test rejects in 4 to 6 %; with five arms any is better in 5 %."""
    two, five = synthetic.null_rate(2000, seeds=5, arms=2), synthetic.null_rate(2000, seeds=5, arms=5, seed=1)
    assert 0.04 <= two.rejections <= 0.06 and two.claims == two.rejections
    assert 0.04 <= five.rejections <= 0.06
    assert five.better <= 0.05 and five.claims <= 0.06
    assert five.claims < 0.6 * 4 * five.rejections  # what it is without Holm's adjustment


def test_power():
    """A difference of 1.68 sd at five seeds, which 80 % of plans should find, is found by 80 +- 3 %."""
    drawn = (synthetic.results({"a": 0.0, "b": -1.68}, 5, seed=i) for i in range(1500))
    found = [compare.compare(results).comparisons[0] for results in drawn]
    assert 0.77 <= np.mean([c.verdict == "better" for c in found]) <= 0.83


@pytest.mark.parametrize("looks, at_most", [([4, 8], 0.062), ([3, 6, 9], 0.066), ([3, 5], 0.055)])
def test_level_of_looks(looks, at_most):
    """Plans that stop at any look that rejects: about 5 % in all, where looking at 5 % each time gives far more."""
    rng, level = np.random.default_rng(1), statistics.stopping(looks).level
    d = rng.normal(size=(20_000, looks[-1]))
    p = np.stack([stats.ttest_1samp(d[:, :n], 0, axis=1).pvalue for n in looks])
    assert 0.035 <= np.mean((p < level).any(0)) <= at_most
    assert np.mean((p < 0.05).any(0)) > at_most + 0.005


@tiers.exhaustive
@pytest.mark.slow
def test_level_of_many_null_plans():
    """10,000 plans: 4.5 to 5.5 %; and 20 plans of identical arms have more than three rejections 1.6 % of the time."""
    assert 0.045 <= synthetic.null_rate(10_000).rejections <= 0.055
    assert abs(stats.binom.sf(3, 20, 0.05) - 0.016) < 0.0005
