"""A toy model whose KV says which tokens it belongs to, so that reading a wrong byte is noticed where it is read."""

from collections import deque
from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np

from pdserve.core.batch import Batch, Row, RowOutput, StepOutput, TokenSource
from pdserve.core.clock import Clock
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import StepHandle
from pdserve.transfer.memory import HostMemory

BLOCK_SIZE = 2
NUM_BLOCKS = 12
LAYOUT = KVLayout(
    group=KVGroup(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32"),
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
)
STEP_SECONDS = 0.05

Prefix = tuple[int, ...]


def next_token(tokens: Prefix) -> int:
    """The model: a function of all tokens so far."""
    return 1 + crc32(np.array(tokens, dtype=np.uint32).tobytes()) % 30_000


def answer_to(prompt: Prefix, max_tokens: int) -> Prefix:
    """What an undisturbed engine says."""
    tokens = prompt
    for _ in range(max_tokens):
        tokens = (*tokens, next_token(tokens))
    return tokens[len(prompt) :]


class Meanings:
    """Numbers for token prefixes; the KV of a position is the number of the tokens up to it. 0 means nothing."""

    def __init__(self) -> None:
        self._numbers: dict[Prefix, int] = {}
        self._prefixes: list[Prefix] = [()]

    def number(self, prefix: Prefix) -> int:
        if prefix not in self._numbers:
            self._numbers[prefix] = len(self._prefixes)
            self._prefixes.append(prefix)
        return self._numbers[prefix]

    def prefix(self, number: int) -> Prefix | None:
        return self._prefixes[number] if 0 < number < len(self._prefixes) else None


class CheckedExecutor:
    """core.protocols.Executor over a HostMemory. A step runs as late as it may, when it is collected; what it reads
    must be the KV of the row's own tokens, else accuse is called."""

    def __init__(self, memory: HostMemory, meanings: Meanings, clock: Clock, accuse: Callable[[str], None]) -> None:
        # [block, k|v, slot]: half a number each.
        self._kv = memory.array.view(np.uint32).reshape(NUM_BLOCKS, 2, BLOCK_SIZE)
        self._meanings = meanings
        self._clock = clock
        self._accuse = accuse
        self._batches: deque[Batch] = deque()
        self._free_at = 0.0
        self._due: dict[int, float] = {}
        self._outputs: dict[int, StepOutput] = {}
        self._tokens: dict[int, Prefix] = {}
        self._previous: dict[int, int] = {}

    def forward(self, batch: Batch) -> StepHandle:
        self._free_at = max(self._free_at, self._clock.monotonic()) + STEP_SECONDS
        self._due[batch.step] = self._free_at
        self._batches.append(batch)
        return batch

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        """Tokens are chosen when the step runs."""

    async def collect(self, handle: StepHandle) -> StepOutput:
        await self._clock.sleep(self._due[handle.step] - self._clock.monotonic())
        while handle.step not in self._outputs:
            batch = self._batches.popleft()
            self._outputs[batch.step] = self._run(batch)
        del self._due[handle.step]
        return self._outputs.pop(handle.step)

    def _run(self, batch: Batch) -> StepOutput:
        for sequence_id in batch.released:
            self._tokens.pop(sequence_id, None)
        sampled = {row.sequence_id: self._row(row) for row in batch.rows}
        self._previous = {sequence_id: token for sequence_id, token in sampled.items() if token is not None}
        rows = tuple(RowOutput(sequence_id=s, token_ids=(t,)) for s, t in self._previous.items())
        return StepOutput(step=batch.step, rows=rows)

    def _row(self, row: Row) -> int | None:
        known = row.token_source is TokenSource.KNOWN
        tokens = self._history(row) + (row.token_ids if known else (self._previous[row.sequence_id],))
        if row.sampler is not None:
            self._tokens[row.sequence_id] = row.sampler.seen_token_ids
        if row.sample and tokens != (expected := self._tokens[row.sequence_id]):
            self._accuse(f"sequence {row.sequence_id} of tokens {expected} computed from KV of {tokens}")
        for position in range(row.start, len(tokens)):
            self._write(row, position, self._meanings.number(tokens[: position + 1]))
        if not row.sample:
            return None
        token = next_token(tokens)
        self._tokens[row.sequence_id] = (*tokens, token)
        return token

    def _history(self, row: Row) -> Prefix:
        """The tokens that the KV below the row's start belongs to."""
        tokens: Prefix = ()
        for position in range(row.start):
            found = self._meanings.prefix(self._read(row, position))
            if found is None or len(found) != position + 1 or found[:-1] != tokens:
                self._accuse(f"sequence {row.sequence_id} reads KV of {found} at position {position}, after {tokens}")
                return (0,) * row.start
            tokens = found
        return tokens

    def _read(self, row: Row, position: int) -> int:
        low, high = self._kv[row.block_ids[position // BLOCK_SIZE], :, position % BLOCK_SIZE].tolist()
        return int(low) | int(high) << 32

    def _write(self, row: Row, position: int, number: int) -> None:
        self._kv[row.block_ids[position // BLOCK_SIZE], :, position % BLOCK_SIZE] = number & 0xFFFFFFFF, number >> 32
