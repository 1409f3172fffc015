"""KV on its way into a waiting sequence's blocks, from a tier or another engine, as the core keeps count of it.

A restore nobody waits for any more leaves its targets in quarantine until it has ended.
"""

from pdserve.engine.core_events import RestoreReady
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.sequence import Sequence
from pdserve.kvcache.manager import KVCacheManager


class Restores:
    """The restores of one core. A sequence has at most one; admission tells those of its lives apart."""

    def __init__(self, scheduler: Scheduler, kv: KVCacheManager) -> None:
        self._scheduler = scheduler
        self._kv = kv
        self._lost: dict[tuple[int, int], tuple[int, ...]] = {}
        """(sequence id, admission) → quarantined targets."""

    def ready(self, sequence: Sequence) -> RestoreReady:
        """What is to be restored for a sequence that has just got its blocks."""
        first, blocks = self._scheduler.restore_blocks(sequence)
        return RestoreReady(
            sequence_id=sequence.sequence_id,
            admission=sequence.admission,
            hashes=tuple(sequence.block_hashes[first : first + len(blocks)]),
            blocks=blocks,
            source=sequence.restoring_from,
        )

    def abandon(self, sequence: Sequence) -> None:
        """Its sequence ends, or goes on without it."""
        _, blocks = self._scheduler.restore_blocks(sequence)
        self._kv.quarantine(blocks)
        self._lost[sequence.sequence_id, sequence.admission] = blocks

    def is_abandoned(self, sequence_id: int, admission: int) -> bool:
        return (sequence_id, admission) in self._lost

    def ended(self, sequence_id: int, admission: int) -> bool:
        """Nothing writes into its targets any more. False if somebody still waits for it."""
        blocks = self._lost.pop((sequence_id, admission), None)
        if blocks is None:
            return False
        self._kv.unquarantine(blocks)
        return True
