"""Learning curves and scaling fits: fewer points, windows, time to a target, and loss by parameters and tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from attnlab.ablation import statistics
from attnlab.errors import UserError

# --- curves -----------------------------------------------------------------------------------------------------------


def decimate(y: Sequence[float], points: int = 400) -> np.ndarray:
    """Indices of at most `points` values to draw: the first, and of every bin the least, the largest and the last.

    Spikes stay. NaN is passed over where its bin has anything else.
    """
    values = np.asarray(y, np.float64)
    if len(values) <= points:
        return np.arange(len(values))
    if points < 4:
        raise UserError(f"points = {points} is not possible; allowed: 4 or more")
    kept = [0]
    for part in np.array_split(np.arange(len(values)), (points - 1) // 3):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept += [finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]]
        kept.append(part[-1])
    return np.unique(kept)


def smooth(y: Sequence[float], window: int) -> np.ndarray:
    """Means of each value and the `window - 1` before it; at the start, of those that are there."""
    if window < 1:
        raise UserError(f"window = {window} is not possible; allowed: 1 or more evaluations")
    total = np.cumsum(np.concatenate([[0.0], np.asarray(y, np.float64)]))
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def time_to_target(
    steps: Sequence[float], values: Sequence[float | None], target: float, direction: str = "lower"
) -> float | None:
    """Steps until a curve first reaches a target, linear in log steps between evaluations; None: it never does.

    A value that is None or not finite is no evaluation.
    """
    sign = 1.0 if direction == "lower" else -1.0
    before = None
    for step, value in zip(steps, values):
        if value is None or not math.isfinite(value):
            continue
        gap = sign * (value - target)
        if gap <= 0:
            if before is None or before[0] <= 0:
                return float(step)
            last, last_gap = before
            share = last_gap / (last_gap - gap)
            return math.exp(math.log(last) + share * (math.log(step) - math.log(last)))
        before = (step, gap)
    return None


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How many times as many steps the baseline takes to a target.

    Attributes:
      ratios: one per pair in which both reach it.
      mean: their geometric mean; None: there are none.
      ci95: of that mean, over pairs; None below ten, where the ratios themselves are what is known.
      unreached: pairs in which one of the two never does.
    """

    ratios: list[float]
    mean: float | None
    ci95: list[float] | None
    unreached: int


def speedup(arm: Sequence[float | None], baseline: Sequence[float | None]) -> Speedup:
    """Of the times to a target of pairs."""
    ratios = [b / a for a, b in zip(arm, baseline, strict=True) if a is not None and b is not None]
    logs, interval = np.log(ratios), None
    if len(ratios) >= statistics.LEAST_BOOTSTRAP:
        interval = [math.exp(bound) for bound in statistics.over_seeds(logs)]
    mean = math.exp(float(logs.mean())) if ratios else None
    return Speedup(ratios, mean, interval, len(arm) - len(ratios))


# --- L = E + A N^-alpha + B D^-beta -----------------------------------------------------------------------------------

_STARTS = [(alpha, beta, e) for alpha in (0.25, 0.5) for beta in (0.25, 0.5) for e in (0.0, 0.7)]
_HUBER = 1e-3


@dataclasses.dataclass(frozen=True)
class Points:
    """Ends of runs, each with a schedule of its own.

    Attributes:
      parameters: N of each, without the embedding.
      tokens: D of each.
      losses: L of each, best the mean of a few seeds.
    """

    parameters: Sequence[float]
    tokens: Sequence[float]
    losses: Sequence[float]

    def __post_init__(self) -> None:
        columns = {f.name: np.asarray(getattr(self, f.name), np.float64) for f in dataclasses.fields(self)}
        if len({column.shape for column in columns.values()}) != 1 or columns["losses"].ndim != 1:
            raise UserError("scaling: parameters, tokens and losses must be lists of one length")
        for name, column in columns.items():
            if not (np.isfinite(column).all() and (column > 0).all()):
                raise UserError(f"scaling: {name} = {column.tolist()} is not possible; allowed: finite, above 0")
        if len(columns["losses"]) < 6:
            raise UserError(f"scaling: {len(columns['losses'])} points for 5 coefficients; allowed: 6 or more")
        for name in ("parameters", "tokens"):
            if len(np.unique(columns[name])) < 3:
                raise UserError(f"scaling: {name} takes fewer than 3 values: its exponent cannot be told")

    @property
    def logs(self) -> np.ndarray:
        """[3, points]: ln N, ln D, ln L."""
        return np.log([self.parameters, self.tokens, self.losses])

    def without(self, index: int) -> Points:
        """All but one."""
        drop = lambda column: np.delete(np.asarray(column, np.float64), index)
        return Points(drop(self.parameters), drop(self.tokens), drop(self.losses))


@dataclasses.dataclass(frozen=True)
class Fit:
    """L = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3; fitted in logs, Huber's delta 1e-3)."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """L at N and D."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def parameters_for(self, loss: float, tokens: float) -> float | None:
        """N that reaches a loss with D tokens; None: no number does."""
        rest = loss - self.E - self.B * tokens**-self.beta
        return (self.A / rest) ** (1 / self.alpha) if rest > 0 else None

    def tokens_for(self, loss: float, parameters: float) -> float | None:
        """D that reaches a loss with N parameters; None: no number does."""
        rest = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / rest) ** (1 / self.beta) if rest > 0 else None


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A fit and how far to trust it.

    Attributes:
      fit: of all points.
      intervals: 95 %, by coefficient, from refits on bootstrap samples of the runs.
      held_out_error: relative error of the loss that a fit without the largest run predicts for it.
      notes: what a reader must know.
    """

    fit: Fit
    intervals: dict[str, list[float]]
    held_out_error: float
    notes: list[str]


def fit(points: Points) -> Fit:
    """The five coefficients."""
    return fit_jointly([points])[0]


def fit_jointly(groups: Sequence[Points]) -> list[Fit]:
    """One fit per architecture, on the same data: E is shared."""
    return _coefficients(_minimum([group.logs for group in groups]))


def scaling(points: Points, draws: int = 200) -> Scaling:
    """A fit with its intervals, its error on the largest run, and what the points are too few or too close for."""
    logs = points.logs
    best = _minimum([logs])
    drawn = [_coefficients(x)[0] for x in _refits([logs], best, draws)]
    intervals = {f.name: _quantiles([getattr(d, f.name) for d in drawn]) for f in dataclasses.fields(Fit)}
    largest = int(np.argmax(logs[0] + logs[1]))
    n, d, loss = (float(np.asarray(c)[largest]) for c in (points.parameters, points.tokens, points.losses))
    error = fit(points.without(largest)).loss(n, d) / loss - 1
    return Scaling(_coefficients(best)[0], intervals, error, _notes(points, intervals))


@dataclasses.dataclass(frozen=True)
class Contest:
    """Two architectures, fitted with one E.

    Attributes:
      arm, baseline: the fits.
      alpha_difference, beta_difference: 95 % intervals of arm minus baseline, from a bootstrap of runs; 0 inside: the
        exponents are not told apart.
      parameter_multiplier, token_multiplier: how many times as many parameters, or tokens, the baseline needs at the
        largest loss that both reach, at the mean tokens (parameters) of the points; None: no number does.
    """

    arm: Fit
    baseline: Fit
    alpha_difference: list[float]
    beta_difference: list[float]
    parameter_multiplier: float | None
    token_multiplier: float | None


def contest(arm: Points, baseline: Points, draws: int = 200) -> Contest:
    """Whether two architectures scale differently."""
    logs = [arm.logs, baseline.logs]
    best = _minimum(logs)
    one, two = _coefficients(best)
    drawn = [_coefficients(x) for x in _refits(logs, best, draws)]
    alpha = _quantiles([a.alpha - b.alpha for a, b in drawn])
    beta = _quantiles([a.beta - b.beta for a, b in drawn])
    loss = min(max(arm.losses), max(baseline.losses))
    middle = np.exp(np.concatenate(logs, axis=1).mean(axis=1))
    ratio = lambda a, b: None if a is None or b is None else float(b / a)
    return Contest(
        one, two, alpha, beta,
        ratio(one.parameters_for(loss, middle[1]), two.parameters_for(loss, middle[1])),
        ratio(one.tokens_for(loss, middle[0]), two.tokens_for(loss, middle[0])),
    )  # fmt: skip


def _quantiles(values: Sequence[float]) -> list[float]:
    return [float(bound) for bound in np.quantile(values, [0.025, 0.975])]


def _notes(points: Points, intervals: dict[str, list[float]]) -> list[str]:
    notes = []
    counts = [len(np.unique(column)) for column in (points.parameters, points.tokens)]
    decades = [math.log10(max(column) / min(column)) for column in (points.parameters, points.tokens)]
    if min(counts) < 4 or min(decades) < 2:
        notes.append(
            f"a first look: {counts[0]} x {counts[1]} values over {decades[0]:.1f} and {decades[1]:.1f} decades; "
            "a fit wants 4 x 4 over 2"
        )
    low, high = intervals["alpha"]
    if min(points.parameters) < 1e6 and low <= 0.1 <= high:
        notes.append("E is not identified: the models are small, and alpha's interval includes 0.1")
    return notes


def _minimum(groups: Sequence[np.ndarray], starts: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """[e, then a, alpha, b, beta of each group] of the least Huber loss of log residuals.

    It is sought where ln N and ln D are measured from their means: there a hardly depends on alpha, nor b on beta, and
    a start at a = alpha mean(ln N) is at 0.
    """
    means = np.array([[*group[:2].mean(axis=1)] for group in groups])
    centred = [group - np.array([[n], [d], [0.0]]) for group, (n, d) in zip(groups, means)]
    if starts is None:
        starts = [np.array([e, *[0.0, alpha, 0.0, beta] * len(groups)]) for alpha, beta, e in _STARTS]
    else:
        starts = [_moved(start, -means) for start in starts]
    found = [
        optimize.least_squares(
            residuals, start, jacobian, loss="huber", f_scale=_HUBER, x_scale="jac", args=(centred,),
            ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=300,
        )
        for start in starts
    ]  # fmt: skip
    return _moved(min(found, key=lambda result: result.cost).x, means)


def _moved(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The same terms of ln N and ln D that are measured from elsewhere."""
    moved = x.copy()
    own = moved[1:].reshape(-1, 4)
    own[:, 0::2] += own[:, 1::2] * means
    return moved


def _terms(x: np.ndarray, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per group [3, points]: logs of A N^-alpha, B D^-beta and E."""
    terms = []
    for group, (a, alpha, b, beta) in zip(groups, x[1:].reshape(-1, 4)):
        terms.append(np.stack([a - alpha * group[0], b - beta * group[1], np.full_like(group[0], x[0])]))
    return terms


def residuals(x: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Log residuals of all groups' points.

    Args:
      x: [e, then a, alpha, b, beta of each group], logs of E, A and B.
      groups: `Points.logs` of each.
    """
    predicted = np.concatenate([np.logaddexp.reduce(term, axis=0) for term in _terms(x, groups)])
    return predicted - np.concatenate([group[2] for group in groups])


def jacobian(x: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Derivatives [points, coefficients] of `residuals`."""
    columns, row = np.zeros((sum(group.shape[1] for group in groups), len(x))), 0
    for i, (group, term) in enumerate(zip(groups, _terms(x, groups))):
        n, d, e = np.exp(term - np.logaddexp.reduce(term, axis=0))  # shares of the loss
        rows = slice(row, row + group.shape[1])
        columns[rows, 0] = e
        columns[rows, 1 + 4 * i : 5 + 4 * i] = np.stack([n, -n * group[0], d, -d * group[1]], axis=1)
        row += group.shape[1]
    return columns


def _refits(groups: Sequence[np.ndarray], best: np.ndarray, draws: int) -> list[np.ndarray]:
    """Fits on samples of the runs, drawn with replacement, that still have 3 values of N and of D."""
    rng, found = np.random.default_rng(0), []
    for _ in range(100 * draws):
        picks = [group[:, rng.integers(group.shape[1], size=group.shape[1])] for group in groups]
        if all(len(np.unique(pick[axis])) >= 3 for pick in picks for axis in (0, 1)):
            found.append(_minimum(picks, [best]))
        if len(found) == draws:
            return found
    raise UserError(
        "scaling: too few points for a bootstrap of runs; allowed: 3 or more values of N and of D, each twice"
    )


def _coefficients(x: np.ndarray) -> list[Fit]:
    return [
        Fit(*map(float, (np.exp(x[0]), np.exp(a), alpha, np.exp(b), beta)))
        for a, alpha, b, beta in x[1:].reshape(-1, 4)
    ]
