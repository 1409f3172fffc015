"""Which differences between the engines of a pool are real: one StepModel of all their steps.

Peers run the same model on the same kind of machine. What tells their own estimates apart is mostly the noise of the
last steps, and a router that believes it sends every request of a quiet moment to whichever engine was lucky. So
all share one model; an engine that is slower or faster than it by more than what may be noise keeps what exceeds that.
What an engine has shown fades while it is idle: one that was slow once gets another chance.
"""

from collections.abc import Hashable
from math import copysign, exp, isclose, log, sqrt
from typing import Generic, TypeVar

from pdserve.core.cluster import StepModel
from pdserve.router.calibration import StepCalibrator, fit_together, scaled

Key = TypeVar("Key", bound=Hashable)

EQUAL_WITHIN = log(1.25)
"""Natural logarithm of the ratio of speeds up to which peers count as equal, however much is known of them."""
REFRESH_SECONDS = 1.0
"""How long the pool's models stay as they are, so that all views of one decision rest on the same ones."""


MEMORY_SECONDS = 30.0
"""Time constant with which the steps of an engine that takes none lose weight."""


TOLERANCE = 0.01
"""Models stay as they are until a term of one has changed by more than this share: every change means looking at all
engines anew."""


LEAST_WEIGHT = 1e-9
"""After days, too, an engine's own steps are better than nothing."""


class PoolModel(Generic[Key]):
    """The step times of one pool's engines. version changes whenever an answer of `model` may."""

    def __init__(self) -> None:
        self._calibrators: dict[Key, StepCalibrator] = {}
        self._heard: dict[Key, tuple[int, float]] = {}
        """Engine → (reports with steps, when the last one came)."""
        self._models: dict[Key, StepModel] = {}
        self._shared: StepModel | None = None
        self._stale_at = float("-inf")
        self.version = 0

    def add(self, key: Key, calibrator: StepCalibrator) -> None:
        """What it learns counts from the next refresh on, until the engine is forgotten."""
        self._calibrators[key] = calibrator

    def forget(self, key: Key) -> None:
        self._calibrators.pop(key, None)
        self._heard.pop(key, None)

    def refresh(self, now: float) -> None:
        """Take in what was learned, if it is time. now: monotonic seconds."""
        if now < self._stale_at:
            return
        knowing = {key: calibrator for key, calibrator in self._calibrators.items() if calibrator.calibrated}
        if not knowing:
            return
        self._stale_at = now + REFRESH_SECONDS
        weights = {key: self._weight(key, calibrator, now) for key, calibrator in knowing.items()}
        shared = fit_together([(knowing[key], weight) for key, weight in weights.items()])
        models = {key: scaled(shared, _certain(knowing[key], weight, shared)) for key, weight in weights.items()}
        if models.keys() == self._models.keys() and all(_alike(models[key], self._models[key]) for key in models):
            return
        self._shared, self._models = shared, models
        self.version += 1

    def model(self, key: Key) -> StepModel | None:
        """An engine's model; the shared one for one that has not taken a step, None before any has."""
        return self._models.get(key, self._shared)

    def _weight(self, key: Key, calibrator: StepCalibrator, now: float) -> float:
        """Of an engine's steps: 1 while it takes some."""
        reports, at = self._heard.get(key, (0, now))
        if calibrator.reports != reports:
            at = now
            self._heard[key] = calibrator.reports, now
        return max(LEAST_WEIGHT, exp((at - now) / MEMORY_SECONDS))


def _alike(one: StepModel, other: StepModel) -> bool:
    return all(
        isclose(mine, its, rel_tol=TOLERANCE)
        for mine, its in (
            (one.base, other.base),
            (one.per_token, other.per_token),
            (one.per_context, other.per_context),
        )
    )


def _certain(calibrator: StepCalibrator, weight: float, shared: StepModel) -> float:
    """How many times slower than the shared model the engine certainly is. The steps of one report, however many,
    were taken under the same conditions, and all may be off by a factor: a machine that was busy, an engine's start."""
    slowness = log(calibrator.evidence.slowness(shared))
    doubt = EQUAL_WITHIN + 1 / sqrt(weight * calibrator.evidence.reports)
    return exp(copysign(max(0.0, abs(slowness) - doubt), slowness))
