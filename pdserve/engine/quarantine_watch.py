"""Whether an engine has lost too much of its KV memory to quarantine.

Blocks leave quarantine when the transfer that may still write into them ends. One that never ends is stopped only by
the end of the process that owns the memory, so beyond a limit the engine gives up the rest, too, and starts anew.
"""

from pdserve.core.endpoint import BlockCounts


class QuarantineWatch:
    """limit: share of the pool; patience: seconds above it. Quarantine that passes, as behind a client who hung up
    during a pull, costs nothing but the wait."""

    def __init__(self, *, limit: float, patience: float) -> None:
        self._limit = limit
        self._patience = patience
        self._above_since: float | None = None

    def look(self, blocks: BlockCounts, now: float) -> bool:
        """Whether quarantine has been above the limit for longer than that, at every look; now is monotonic."""
        if blocks.quarantined <= self._limit * blocks.total:
            self._above_since = None
            return False
        if self._above_since is None:
            self._above_since = now
        return now - self._above_since >= self._patience
