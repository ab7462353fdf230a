"""Statistics for few seeds: is the difference of two arms more than seeds make, and what could not have been seen.

The default test is the paired t: at 3 to 8 pairs its level holds for differences that are normal, heavy-tailed (t with
3 degrees of freedom) or have outliers, where a percentile bootstrap over seeds rejects up to a quarter of true nulls.
What a number of seeds is too small for is None, never "not significant".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, special, stats

from attnlab.ablation.results import Failures, Stopping
from attnlab.errors import UserError

LEVEL = 0.05
LEAST_RANKED = 6  # below, no sign pattern or rank sum is rarer than 5 %
LEAST_BOOTSTRAP = 10  # below, a bootstrap over seeds is far too sure of itself
_EXACT = 16  # pairs up to which all 2^n sign patterns are tried; beyond, _DRAWS of them
_DRAWS = 99_999

# Nominal levels of designs that look more than once, for 5 % over all looks: Pocock's constants for equally spaced
# looks, Bonferroni for (3, 5).
_SEQUENTIAL = {(4, 8): 0.0294, (3, 6, 9): 0.0221, (3, 5): 0.025}


def stopping(looks: Sequence[int]) -> Stopping:
    """The design that looks at results after these numbers of seeds.

    Raises:
      UserError: it is not one whose level is known: one look, or (4, 8), (3, 6, 9) or (3, 5).
    """
    looks = tuple(looks)
    if len(looks) == 1 and looks[0] >= 1:
        return Stopping(list(looks), LEVEL)
    if looks not in _SEQUENTIAL:
        known = ", ".join(map(str, _SEQUENTIAL))
        found = f"stopping: looks after {list(looks)} seeds have no known level"
        raise UserError(f"{found}; allowed: one look at any number, or {known}")
    return Stopping(list(looks), _SEQUENTIAL[looks])


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two arms, and how well it is known: everything that a t distribution says of it.

    Attributes:
      test: `paired t` or `Welch`.
      n: pairs; unpaired: the smaller number of runs.
      mean: arm minus baseline.
      sd: of the paired differences; unpaired: the root of the sum of both variances.
      se: standard error of the mean; None: fewer than two runs.
      df: degrees of freedom.
      same: every run has its like in the other arm, to the last bit.
    """

    test: str
    n: int
    mean: float
    sd: float | None
    se: float | None
    df: float | None
    same: bool = False

    @property
    def testable(self) -> bool:
        """Whether there is a spread to compare the mean with."""
        return self.se is not None and self.se > 0

    @property
    def t(self) -> float | None:
        """mean / se."""
        return self.mean / self.se if self.testable else None

    @property
    def p(self) -> float | None:
        """Two-sided; 1 for arms that are the same. None: there is no test."""
        if self.testable:
            return float(2 * special.stdtr(self.df, -abs(self.t)))
        return 1.0 if self.same else None

    def interval(self, confidence: float = 0.95) -> list[float] | None:
        """Confidence interval of the mean difference."""
        if self.testable:
            half = special.stdtrit(self.df, (1 + confidence) / 2) * self.se
            return [float(self.mean - half), float(self.mean + half)]
        return [self.mean, self.mean] if self.same and self.se is not None else None

    def tost(self, margin: float) -> float | None:
        """p of two one-sided tests (Schuirmann 1987) of a true difference outside (-margin, margin).

        Below 5 % exactly where the 90 % interval lies inside the margin.
        """
        if not self.testable:
            return None
        low, high = -(self.mean + margin) / self.se, (self.mean - margin) / self.se
        return float(special.stdtr(self.df, max(low, high)))

    def detectable(self, power: float = 0.8, level: float = LEVEL) -> float | None:
        """The smallest true difference that this test finds with a probability, from the noncentral t."""
        return _noncentrality(self.df, power, level) * self.se if self.testable else None


def paired(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The differences of pairs. Raises UserError for different numbers of them, none, or one that is not finite."""
    a, b = _finite(arm, 1), _finite(baseline, 1)
    if len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} runs are no pairs")
    n, d = len(a), a - b
    sd = float(d.std(ddof=1)) if n > 1 else None
    if sd is not None and sd <= _rounding(a, b):
        sd = 0.0
    se = None if sd is None else sd / math.sqrt(n)
    return Difference("paired t", n, float(d.mean()), sd, se, float(n - 1) if n > 1 else None, same=not d.any())


def unpaired(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The difference of means (Welch 1947). Raises UserError where an arm has no runs, or one that is not finite."""
    a, b = _finite(arm, 1), _finite(baseline, 1)
    n, mean = min(len(a), len(b)), float(a.mean() - b.mean())
    if n < 2:
        return Difference("Welch", n, mean, None, None, None)
    va, vb = float(a.var(ddof=1)), float(b.var(ddof=1))
    ea, eb = va / len(a), vb / len(b)
    if math.sqrt(va + vb) <= _rounding(a, b):
        return Difference("Welch", n, mean, 0.0, 0.0, float(len(a) + len(b) - 2), same=mean == 0)
    df = (ea + eb) ** 2 / (ea**2 / (len(a) - 1) + eb**2 / (len(b) - 1))
    return Difference("Welch", n, mean, math.sqrt(va + vb), math.sqrt(ea + eb), df)


def _finite(values: Sequence[float], least: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        raise UserError(f"{array.tolist()} is not possible; allowed: a list of {least} or more finite numbers")
    return array


def _rounding(a: np.ndarray, b: np.ndarray) -> float:
    """What differences that are equal may differ by in float64."""
    return 1e-13 * float(max(np.abs(a).max(), np.abs(b).max()))


@functools.lru_cache(maxsize=4096)
def _noncentrality(df: float, power: float, level: float) -> float:
    critical = special.stdtrit(df, 1 - level / 2)
    other = lambda nc: np.nan_to_num(stats.nct.cdf(-critical, df, nc))  # far below 1e-12 where SciPy gives NaN
    found = lambda nc: stats.nct.sf(critical, df, nc) + other(nc)
    high = 2.0 * critical
    while found(high) < power:
        high *= 2
    return float(optimize.brentq(lambda nc: found(nc) - power, 0.0, high, xtol=1e-13, rtol=1e-14))


def correlation(arm: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Pearson's r of pairs; None: fewer than three, or an arm that does not vary."""
    a, b = _finite(arm, 1), _finite(baseline, 1)
    if len(a) < 3 or min(a.std(), b.std()) <= _rounding(a, b):
        return None
    u, v = a - a.mean(), b - b.mean()
    return float(np.clip(u @ v / math.sqrt((u @ u) * (v @ v)), -1, 1))


def sign_flip(differences: Sequence[float]) -> float | None:
    """Share of sign patterns whose mean is at least as far from 0; None below six, where it cannot reach 5 %.

    All patterns up to 16 differences, beyond that 99,999 drawn with a fixed seed.
    """
    d = _finite(differences, 1)
    if len(d) < LEAST_RANKED:
        return None
    drawn = {} if len(d) <= _EXACT else {"rng": np.random.default_rng(0)}
    draws = np.inf if len(d) <= _EXACT else _DRAWS
    mean = lambda a, b, axis: np.mean(a - b, axis=axis)
    test = stats.permutation_test(
        (d, np.zeros_like(d)), mean, permutation_type="samples", vectorized=True, n_resamples=draws, batch=4096, **drawn
    )
    return float(test.pvalue)


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Signed-rank test, exact up to 16 differences that are not 0; None below six of them.

    Where ranks are tied the distribution is that of the tied ranks under all sign patterns.
    """
    d = _finite(differences, 1)
    d = d[d != 0]
    if len(d) < LEAST_RANKED:
        return None
    if len(np.unique(np.abs(d))) == len(d):
        return float(stats.wilcoxon(d, method="exact").pvalue)
    return sign_flip(np.sign(d) * stats.rankdata(np.abs(d)))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979), in the order given."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, (len(values) - np.arange(len(values))) * values[order])
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def over_examples(differences: Sequence[float]) -> list[float]:
    """BCa bootstrap interval (Efron 1987) of a mean over documents or examples: of a test set, never of seeds.

    Raises:
      UserError: there are fewer than ten.
    """
    return _bootstrap(_finite(differences, 1), np.mean, "examples")


def over_seeds(values: Sequence[float], statistic: Callable = np.mean) -> list[float]:
    """BCa bootstrap interval of a statistic over seeds.

    Raises:
      UserError: there are fewer than ten; at three, such an interval misses a quarter of the time.
    """
    return _bootstrap(_finite(values, 1), statistic, "seeds")


def _bootstrap(values: np.ndarray, statistic: Callable, of: str) -> list[float]:
    if len(values) < LEAST_BOOTSTRAP:
        raise UserError(
            f"{len(values)} {of} are too few for a bootstrap; allowed: {LEAST_BOOTSTRAP} or more, or a t interval"
        )
    if np.ptp(values) == 0:
        return [float(values[0])] * 2
    batch, rng = max(1, 10_000_000 // len(values)), np.random.default_rng(0)
    found = stats.bootstrap((values,), statistic, method="BCa", vectorized=True, batch=batch, rng=rng)
    return [float(bound) for bound in found.confidence_interval]


@dataclasses.dataclass(frozen=True)
class Rank:
    """Spearman's correlation, its p, and a BCa interval over arms; None: too few, none, or arms in perfect order."""

    rho: float | None
    p: float | None
    ci95: list[float] | None


def spearman(x: Sequence[float], y: Sequence[float]) -> Rank:
    """Rank correlation of a figure with another over arms, e.g. recall with bytes of state."""
    a, b = _finite(x, 1), _finite(y, 1)
    if len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} values are no pairs")
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Rank(None, None, None)
    test, interval = stats.spearmanr(a, b), None
    if len(a) >= LEAST_BOOTSTRAP and abs(test.statistic) < 1:
        with np.errstate(all="ignore"):  # a sample of one arm alone has no correlation
            found = stats.bootstrap((a, b), _rank_correlation, paired=True, vectorized=True, method="BCa",
                                    n_resamples=1999, rng=np.random.default_rng(0))  # fmt: skip
        bounds = [float(bound) for bound in found.confidence_interval]
        interval = bounds if np.isfinite(bounds).all() else None
    return Rank(float(test.statistic), float(test.pvalue), interval)


def _rank_correlation(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    ranks = [stats.rankdata(values, axis=axis) for values in (x, y)]
    u, v = (rank - rank.mean(axis=axis, keepdims=True) for rank in ranks)
    return (u * v).sum(axis) / np.sqrt((u * u).sum(axis) * (v * v).sum(axis))


def failures(
    arm: Sequence[float | None],
    baseline: Sequence[float | None],
    pairs: Sequence[tuple[float | None, float | None]],
    direction: str,
) -> Failures | None:
    """Runs that failed, and the sign test over pairs in which a failure is worse than anything.

    Args:
      arm, baseline: a value per run that ended; None: it failed.
      pairs: those of them that are of one seed, the arm's first.
      direction: `lower` or `higher` is better.

    Returns:
      None where nothing failed.
    """
    failed, before = sum(v is None for v in arm), sum(v is None for v in baseline)
    if not failed + before:
        return None
    table = [[failed, len(arm) - failed], [before, len(baseline) - before]]
    sign = -1.0 if direction == "lower" else 1.0
    score = lambda value: -math.inf if value is None else sign * value
    scores = [(score(a), score(b)) for a, b in pairs]
    wins, losses = sum(a > b for a, b in scores), sum(a < b for a, b in scores)
    sign_p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else None
    fisher_p = float(stats.fisher_exact(table).pvalue)
    return Failures(failed, len(arm), before, len(baseline), fisher_p, wins, losses, sign_p)


def verdict(
    difference: Difference, p: float | None, *, direction: str, margin: float | None = None, level: float = LEVEL
) -> str:
    """One word by rule.

    `identical`: no run differs from its pair. `better`, `worse`: p is below the level and the 95 % interval excludes 0;
    with `trivially` before it where the whole interval lies inside the margin. `equivalent`: the two one-sided tests
    are below the level. Else `inconclusive`.

    Args:
      p: of the difference, adjusted where it is one of several.
      direction: `lower` or `higher` is better.
      margin: the smallest difference that matters; None: there is no telling what is trivial, or equivalent.
    """
    if difference.same and difference.n > 1:
        return "identical"
    interval = difference.interval()
    if interval is None or p is None:
        return "inconclusive"
    low, high = interval
    if p < level and (low > 0 or high < 0):
        word = "better" if (difference.mean < 0) == (direction == "lower") else "worse"
        return f"trivially {word}" if margin is not None and -margin < low and high < margin else word
    return "equivalent" if margin is not None and difference.tost(margin) < level else "inconclusive"
