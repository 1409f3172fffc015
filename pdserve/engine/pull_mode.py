"""Whether a prompt's KV is pulled region by region while it is computed, or at once when it is complete.

Pure: predictions from what earlier handoffs between the same two engines took. Time counts from the moment the
prompt's last block is final, because only what comes after it delays the second token.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, inf

from pdserve.engine.regions import num_regions
from pdserve.transfer.speed import LinkSpeed

BULK_GAIN = 0.1
"""Bulk must be this much faster to be chosen: its prediction gains nothing from a prompt that takes longer."""

EXPLORE_EVERY = 16
"""So often, a handoff is progressive whatever is predicted: only then can production be measured."""

_DECAY = 0.95
_MIN_SAMPLES = 4
_MIN_SPREAD = 0.1
"""Standard deviation of the pulls' sizes, relative to their mean, below which overhead and rate look the same."""


class PullMode(StrEnum):
    PROGRESSIVE = "progressive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Production:
    """How a prefill engine makes regions: their size in blocks, and the seconds from one block to the next."""

    region_blocks: float
    seconds_per_block: float


@dataclass(frozen=True, slots=True)
class PullForecast:
    """Seconds from the last final block to the last verified one, by mode; 0.0 and 0.0 when nothing is known yet."""

    mode: PullMode = PullMode.PROGRESSIVE
    progressive: float = 0.0
    bulk: float = 0.0


def forecast(num_blocks: int, block_bytes: int, link: LinkSpeed, production: Production) -> PullForecast:
    """What pulling num_blocks either way would take.

    Progressive pulls that are faster than production leave the last region; slower ones fall behind with each.
    """
    region_blocks = min(production.region_blocks, num_blocks)
    regions = ceil(num_blocks / region_blocks)
    one = link.seconds(round(region_blocks * block_bytes))
    behind = max(0.0, one - production.seconds_per_block * region_blocks)
    progressive = one + (regions - 1) * behind
    bulk = (num_regions(block_bytes, num_blocks) - 1) * link.overhead + link.seconds(num_blocks * block_bytes)
    mode = PullMode.BULK if bulk < progressive * (1 - BULK_GAIN) else PullMode.PROGRESSIVE
    return PullForecast(mode, progressive, bulk)


@dataclass(slots=True)
class PullHistory:
    """What handoffs from one engine took; older ones count less."""

    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Decayed n, Σ bytes, Σ seconds, Σ bytes², Σ bytes · seconds over pulls."""
    _blocks: float = 0.0
    _regions: float = 0.0
    _producing: float = 0.0
    _handoffs: int = 0
    _ended_at: float = -inf
    """When the last pull ended."""

    def pulled(self, num_bytes: int, seconds: float, ended_at: float) -> None:
        """A pull ended (monotonic) that took so long, its wait for its turn not counted.

        Of pulls that share the link, each takes the time since the end of the one before it."""
        seconds = min(seconds, ended_at - self._ended_at)
        self._ended_at = ended_at
        terms = (1.0, num_bytes, seconds, num_bytes * num_bytes, num_bytes * seconds)
        self._sums = [_DECAY * total + term for total, term in zip(self._sums, terms, strict=True)]

    def produced(self, num_blocks: int, seconds: float) -> None:
        """A region of so many blocks became ready so long after the one before it."""
        self._blocks = _DECAY * self._blocks + num_blocks
        self._regions = _DECAY * self._regions + 1
        self._producing = _DECAY * self._producing + seconds

    def link(self) -> LinkSpeed | None:
        """The line through the pulls' sizes and times; None while it cannot be drawn."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        if n < _MIN_SAMPLES * _DECAY**_MIN_SAMPLES or spread <= (_MIN_SPREAD * x) ** 2:
            return None
        slope = (n * xy - x * y) / spread
        overhead = (y - slope * x) / n
        if slope <= 0 or overhead < 0:
            return None
        return LinkSpeed(overhead, 1 / slope)

    def production(self) -> Production | None:
        if not self._regions:
            return None
        return Production(self._blocks / self._regions, self._producing / self._blocks)

    def decide(self, num_blocks: int, block_bytes: int) -> PullForecast:
        """How to pull num_blocks now. Progressive while too little is known."""
        self._handoffs += 1
        link, production = self.link(), self.production()
        if not num_blocks or link is None or production is None:
            return PullForecast()
        predicted = forecast(num_blocks, block_bytes, link, production)
        if self._handoffs % EXPLORE_EVERY == 0:
            return PullForecast(PullMode.PROGRESSIVE, predicted.progressive, predicted.bulk)
        return predicted
