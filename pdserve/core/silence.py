"""How long a peer has said nothing, as far as its listener can tell."""

from pdserve.core.clock import Clock


class Silence:
    """Whoever listens looks every so many seconds. If it comes much later than that, it did not run itself (stopped,
    starved), and for so long nobody was silent: what was said meanwhile is still to be read."""

    def __init__(self, clock: Clock, look_every: float) -> None:
        self._clock = clock
        self._look_every = look_every
        self._heard = self._looked = clock.monotonic()

    def heard(self) -> None:
        self._heard = self._clock.monotonic()

    def look(self) -> float:
        """Seconds since the peer was last heard, without those in which nobody listened."""
        now = self._clock.monotonic()
        late = now - self._looked - self._look_every
        if late > self._look_every:
            self._heard = min(now, self._heard + late)
        self._looked = now
        return now - self._heard
