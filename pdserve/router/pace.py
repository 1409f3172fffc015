"""How fast a tenant's requests get their turn, by those that had to wait: whatever it is that holds them up."""

from dataclasses import dataclass
from math import exp

_MEMORY = 30.0
"""Seconds after which what was seen counts e times less."""


@dataclass(slots=True)
class Pace:
    """Turns taken, and the seconds in which somebody waited for one. Times are monotonic seconds."""

    turns: float = 0.0
    waited: float = 0.0
    waiting: int = 0
    at: float = 0.0

    def came(self, now: float) -> None:
        self._elapse(now)
        self.waiting += 1

    def left(self, now: float, *, served: bool) -> None:
        self._elapse(now)
        self.waiting -= 1
        self.turns += served

    def seconds(self, ahead: int, now: float) -> float:
        """Until so many have had their turn. While none has, the time since then is taken for that of one."""
        self._elapse(now)
        return ahead * self.waited / max(1.0, self.turns)

    def _elapse(self, now: float) -> None:
        fade = exp((self.at - now) / _MEMORY)
        self.turns *= fade
        self.waited = self.waited * fade + (_MEMORY * (1 - fade) if self.waiting else 0.0)
        self.at = now
