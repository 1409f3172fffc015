"""Blocks of prompts that were just dispatched: their engines will announce them soon, or never."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.blocks import BlockHash
from pdserve.core.cluster import EngineKey


@dataclass(frozen=True, slots=True)
class _Note:
    """What one prompt lets expect of an engine until a time."""

    until: float
    key: EngineKey
    hashes: Sequence[BlockHash]


@dataclass(slots=True)
class ExpectedBlocks:
    """By engine: block hash → the time until which it is expected there. Every expectation lasts `patience` seconds at
    most, and of more than max_blocks in all the oldest prompts' are forgotten."""

    patience: float
    max_blocks: int
    by_engine: dict[EngineKey, dict[BlockHash, float]] = field(default_factory=dict)
    _notes: deque[_Note] = field(default_factory=deque)
    """Oldest first, which is the first to end."""
    _num_noted: int = 0

    def __len__(self) -> int:
        """Blocks expected somewhere; those that have been for too long go with the next `add`."""
        return sum(map(len, self.by_engine.values()))

    def add(self, key: EngineKey, hashes: Sequence[BlockHash], now: float) -> None:
        hashes = hashes[-self.max_blocks :]
        note = _Note(now + self.patience, key, hashes)
        noted = dict.fromkeys(hashes, note.until)
        if known := self.by_engine.get(key):
            known.update(noted)
        else:
            self.by_engine[key] = noted
        self._notes.append(note)
        self._num_noted += len(hashes)
        while self._num_noted > self.max_blocks or self._notes[0].until <= now:
            self._end(self._notes.popleft())
            if not self._notes:
                return

    def arrived(self, key: EngineKey, hashes: Sequence[BlockHash]) -> None:
        """The engine has announced them."""
        if blocks := self.by_engine.get(key):
            for block_hash in hashes:
                blocks.pop(block_hash, None)
            if not blocks:
                del self.by_engine[key]

    def retract(self, key: EngineKey, hashes: Sequence[BlockHash], since: float) -> None:
        """What was expected at that time will not come. Blocks that are expected anew since are left alone."""
        self._remove(key, hashes, since + self.patience)

    def forget(self, key: EngineKey) -> None:
        """The incarnation has left."""
        self.by_engine.pop(key, None)

    def _end(self, note: _Note) -> None:
        self._num_noted -= len(note.hashes)
        self._remove(note.key, note.hashes, note.until)

    def _remove(self, key: EngineKey, hashes: Sequence[BlockHash], until: float) -> None:
        blocks = self.by_engine.get(key)
        if blocks is None:
            return
        for block_hash in hashes:
            if blocks.get(block_hash) == until:
                del blocks[block_hash]
        if not blocks:
            del self.by_engine[key]
