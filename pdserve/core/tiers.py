"""KV kept below the device pool: what the engine and the worker that holds the tiers say to each other."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.blocks import BlockHash
from pdserve.core.blocks import Tier as Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TierTally:
    """One tier: its size and filling in blocks now, and what has happened since it was opened.

    evicted counts blocks that left for want of room (also those that went on to the next tier), refused those
    that were not let in, corrupt those whose bytes did not verify, failed those lost to I/O errors.
    """

    tier: Tier
    capacity: int
    blocks: int
    saved_bytes: int = 0
    restored_blocks: int = 0
    restored_bytes: int = 0
    evicted: int = 0
    refused: int = 0
    corrupt: int = 0
    failed: int = 0
    seconds_per_block: float = 0.0
    """What a restore from here takes, as the engine has measured it; 0 when it has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierNews:
    """What changed since the news before: for each hash the nearest tier that holds it now, None for no more.

    News only steer what is asked for. What they name may be gone when it is asked for, and is then named again."""

    changes: tuple[tuple[BlockHash, Tier | None], ...]
    tallies: tuple[TierTally, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRead:
    """Part of a restore: verified blocks of one tier, and the seconds they took."""

    tier: Tier
    blocks: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReceipt:
    """A restore that ended: the first num_blocks target blocks hold verified bytes, the others anything."""

    num_blocks: int
    reads: tuple[TierRead, ...]
    news: TierNews


SavedBlock = tuple[BlockHash, int]
"""A block's hash and its id in the device pool."""


class TierService(Protocol):
    """The worker's store below its KV memory. Calls may overlap.

    Each raises EngineDied when the worker is gone; nothing reads or writes its memory any more then.
    """

    def contents(self) -> Awaitable[TierNews]:
        """Everything held."""
        ...

    def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> Awaitable[TierNews]:
        """Copy final blocks out; the caller keeps their bytes as they are until this returns. Some may not be
        taken. used names other blocks that a sequence has found in the device pool, which counts as use; wrong those
        whose KV was computed wrong: what is held of them, these blocks included, is deleted for good."""
        ...

    def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> Awaitable[RestoreReceipt]:
        """Copy into target blocks, in order, and verify; ends early at the first that is gone or damaged.

        The targets may be written until this returns, however long that is, even if the caller no longer waits."""
        ...
