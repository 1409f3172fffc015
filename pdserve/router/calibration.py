"""What a step costs on one engine, learned from the steps it has taken: t = a + b · tokens + c · context.

Recursive least squares of relative errors, with forgetting: the sums of the normal equations fade, a prior
does not, so that what the load says nothing about stays sane. No term is ever negative, and a step that reads no
context takes time too: without that, prompts would seem free.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import StepTally

_KEEP = 0.97
"""What remains of older knowledge after each report with steps in it; they come once a second."""
_PRIOR_WEIGHT = 0.02
"""Of the prior, in steps."""
_LEAST_SHARE = 0.1
"""A term a peer found smaller than this share of what the others suggest is taken as unknown, not as zero: else
it would stay zero in its heirs for ever."""
_TYPICAL_STEP = (64.0, 16384.0)
"""(tokens, context) of a step by which whole models are compared."""


@dataclass(slots=True)
class Evidence:
    """Normal equations of steps taken, and how many reports they came in; older ones count less.

    Errors count relative to what was expected, not to what was measured: else steps that happened to be fast would
    count most, and a busy machine would look idle."""

    matrix: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    vector: list[float] = field(default_factory=lambda: [0.0] * 3)
    reports: float = 0.0

    def fade(self) -> None:
        for row in self.matrix:
            row[:] = [_KEEP * value for value in row]
        self.vector = [_KEEP * value for value in self.vector]
        self.reports *= _KEEP

    def observe(self, tally: StepTally, expected: StepModel) -> None:
        features = (1.0, tally.tokens / tally.steps, tally.context / tally.steps)
        seconds = tally.seconds / tally.steps
        weight = tally.steps / expected.seconds(features[1], features[2]) ** 2
        for i, x in enumerate(features):
            self.vector[i] += weight * x * seconds
            for j, y in enumerate(features):
                self.matrix[i][j] += weight * x * y

    def add(self, other: "Evidence", weight: float) -> None:
        for i in range(3):
            self.vector[i] += weight * other.vector[i]
            for j in range(3):
                self.matrix[i][j] += weight * other.matrix[i][j]
        self.reports += weight * other.reports

    def slowness(self, model: StepModel) -> float:
        """How many times what the model says these steps took, at least squares; 1 without steps."""
        theta = (model.base, model.per_token, model.per_context)
        said = sum(theta[i] * self.matrix[i][j] * theta[j] for i in range(3) for j in range(3))
        return sum(theta[i] * self.vector[i] for i in range(3)) / said if said > 0 else 1.0


class StepCalibrator:
    """Online estimate of one engine's StepModel. prior: what to start from, such as a peer's model."""

    def __init__(self, prior: StepModel | None = None) -> None:
        self._prior = _plausible(prior) if prior else StepModel()
        self._is_scaled = prior is not None
        self.evidence = Evidence()
        self._seen: tuple[StepTally, ...] = ()
        self.model = prior or self._prior
        self.reports = 0
        """Those with steps in them."""

    @property
    def calibrated(self) -> bool:
        """Whether model rests on steps of this engine."""
        return self.reports > 0

    def update(self, tallies: Sequence[StepTally]) -> None:
        """Take in an engine's tallies since its start; what was seen before counts once."""
        seen = self._seen + (StepTally(),) * (len(tallies) - len(self._seen))
        fresh = [_difference(now, before) for now, before in zip(tallies, seen, strict=False)]
        self._seen = tuple(tallies)
        fresh = [tally for tally in fresh if tally.steps > 0 and tally.seconds > 0]
        if not fresh:
            return
        if not self._is_scaled:
            self._scale_prior(fresh)
        expected = self.model if self.calibrated else self._prior
        self.evidence.fade()
        for tally in fresh:
            self.evidence.observe(tally, expected)
        self.evidence.reports += 1
        self.model = fit(self.evidence, self._prior)
        self.reports += 1

    def _scale_prior(self, tallies: list[StepTally]) -> None:
        """The first steps tell how fast the machine is; the prior only how the terms relate."""
        expected = sum(
            self._prior.base * t.steps + self._prior.per_token * t.tokens + self._prior.per_context * t.context
            for t in tallies
        )
        factor = sum(t.seconds for t in tallies) / expected
        self._prior = scaled(self._prior, factor)
        self._is_scaled = True


def fit(evidence: Evidence, prior: StepModel) -> StepModel:
    """The best fit with no negative term: every subset of the three terms is tried, except context alone."""
    start = (prior.base, prior.per_token, prior.per_context)
    matrix = [row[:] for row in evidence.matrix]
    vector = evidence.vector[:]
    for i, value in enumerate(start):
        precision = _PRIOR_WEIGHT / max(value, 1e-12) ** 2
        matrix[i][i] += precision
        vector[i] += precision * value
    best, best_error = start, float("inf")
    for size in (3, 2, 1):
        for terms in combinations(range(3), size):
            theta = _solve_terms(matrix, vector, terms)
            if min(theta) < 0 or theta[0] + theta[1] <= 0:
                continue
            # The error up to a constant: θᵀMθ − 2θᵀv.
            error = sum(theta[i] * (sum(matrix[i][j] * theta[j] for j in range(3)) - 2 * vector[i]) for i in range(3))
            if error < best_error:
                best, best_error = theta, error
    return StepModel(base=best[0], per_token=best[1], per_context=best[2])


def fit_together(weighted: Sequence[tuple[StepCalibrator, float]]) -> StepModel:
    """One model of all their steps, each calibrator's by its weight. Each must have seen some."""
    everything, priors = Evidence(), list[StepModel]()
    for calibrator, weight in weighted:
        everything.add(calibrator.evidence, weight)
        priors.append(_plausible(calibrator.model))
    prior = StepModel(
        base=fmean(prior.base for prior in priors),
        per_token=fmean(prior.per_token for prior in priors),
        per_context=fmean(prior.per_context for prior in priors),
    )
    return fit(everything, prior)


def scaled(model: StepModel, factor: float) -> StepModel:
    return StepModel(
        base=model.base * factor, per_token=model.per_token * factor, per_context=model.per_context * factor
    )


def _plausible(model: StepModel) -> StepModel:
    """A peer's model with no term much smaller than in the default's proportions."""
    share = _LEAST_SHARE * model.seconds(*_TYPICAL_STEP) / StepModel().seconds(*_TYPICAL_STEP)
    like = scaled(StepModel(), share)
    return StepModel(
        base=max(model.base, like.base),
        per_token=max(model.per_token, like.per_token),
        per_context=max(model.per_context, like.per_context),
    )


def _difference(now: StepTally, before: StepTally) -> StepTally:
    return StepTally(
        steps=now.steps - before.steps,
        tokens=now.tokens - before.tokens,
        context=now.context - before.context,
        seconds=now.seconds - before.seconds,
    )


def _solve_terms(matrix: list[list[float]], vector: list[float], terms: tuple[int, ...]) -> tuple[float, float, float]:
    """Gaussian elimination over some of the unknowns; the others are zero. Rows are scaled first: features
    differ by many orders of magnitude."""
    scale = [matrix[i][i] ** -0.5 for i in terms]
    rows = [
        [matrix[i][j] * scale[a] * scale[b] for b, j in enumerate(terms)] + [vector[i] * scale[a]]
        for a, i in enumerate(terms)
    ]
    size = len(terms)
    for k in range(size):
        # Positive definite thanks to the prior: no pivoting needed, and no pivot is zero.
        for row in rows[k + 1 :]:
            factor = row[k] / rows[k][k]
            row[k:] = [value - factor * above for value, above in zip(row[k:], rows[k][k:], strict=True)]
    solution = [0.0] * size
    for k in reversed(range(size)):
        rest = sum(rows[k][j] * solution[j] for j in range(k + 1, size))
        solution[k] = (rows[k][size] - rest) / rows[k][k]
    theta = [0.0, 0.0, 0.0]
    for a, i in enumerate(terms):
        theta[i] = solution[a] * scale[a]
    return theta[0], theta[1], theta[2]
