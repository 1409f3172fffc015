"""How far predicted first tokens can be trusted: by those of requests that had to wait, when they came."""

from dataclasses import dataclass

_GAIN = 0.1
_SMALL = 0.05
"""Of the target. What takes much less tells of fixed costs, not of how wrong a prediction of many seconds is."""


@dataclass(slots=True)
class WaitError:
    """Sums that forget, of what was predicted and of what it took. All times in seconds, from arrival to first token.

    target: within which first tokens are to come.
    """

    target: float
    predicted: float = 0.0
    actual: float = 0.0

    def seen(self, predicted: float, actual: float) -> None:
        """The first token of a request that waited has come."""
        self.predicted += _GAIN * (predicted - self.predicted)
        self.actual += _GAIN * (actual - self.actual)

    @property
    def ratio(self) -> float:
        """Of what it takes to what is predicted, where that comes near the target. At least 1."""
        small = _SMALL * self.target
        return max(1.0, (self.actual + small) / (self.predicted + small))
