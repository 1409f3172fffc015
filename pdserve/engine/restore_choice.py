"""Whether KV that a tier holds is worth restoring, or sooner computed again. Pure; fed with what was measured."""

from collections.abc import Iterable, Sequence

from pdserve.core.endpoint import StepTally
from pdserve.core.tiers import Tier, TierRead

_PROMPT_STEP_BITS = 6
"""Steps of at least 2 ** (this − 1) tokens tell what a prompt's token costs."""

_NEW_SHARE = 0.25
"""Weight of a new measurement of a tier against all before."""

_HOPE = 0.95
"""A tier that was passed over is believed to be this much faster the next time, until it is measured again."""


def seconds_per_token(steps: Iterable[StepTally]) -> float | None:
    """What computing a prompt costs, from an engine's tallies by step size; None before the first prompt."""
    large = [tally for bits, tally in enumerate(steps) if bits >= _PROMPT_STEP_BITS]
    tokens = sum(tally.tokens for tally in large)
    return sum(tally.seconds for tally in large) / tokens if tokens else None


def best_prefix(savings: Iterable[float]) -> int:
    """How many leading blocks to restore when each saves so many seconds (or costs, below 0)."""
    best = total = 0.0
    chosen = 0
    for count, saving in enumerate(savings, 1):
        total += saving
        if total > best:
            best, chosen = total, count
    return chosen


class RestoreChoice:
    """Knows each tier's seconds per block. What nobody has measured yet is tried."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._seconds: dict[Tier, float] = {}
        self._late = 0

    def measured(self, reads: Iterable[TierRead]) -> None:
        for read in reads:
            new = read.seconds / read.blocks
            old = self._seconds.get(read.tier, new)
            self._seconds[read.tier] = old + _NEW_SHARE * (new - old)

    def seconds_per_block(self, tier: Tier) -> float:
        """0 when nobody has measured it yet."""
        return self._seconds.get(tier, 0.0)

    def late(self) -> None:
        """A restore did not end in time: no others are begun until `settled`."""
        self._late += 1

    def settled(self) -> None:
        self._late -= 1

    def choose(self, tiers: Sequence[Tier], per_token: float | None) -> int:
        """How many of a chain's next blocks, in these tiers, to restore; computing a token takes per_token seconds."""
        if self._late:
            return 0
        if per_token is None:
            return len(tiers)
        compute = per_token * self._block_size
        count = best_prefix(compute - self._seconds.get(tier, 0.0) for tier in tiers)
        for tier in set(tiers[count:]) & self._seconds.keys():
            self._seconds[tier] *= _HOPE
        return count
