"""Measuring a connection before KV depends on it: bit-exact reads of a pattern beside the peer's blocks.

A memory that is PROBE_AREA_BYTES larger than its layout holds, behind the blocks, a pattern that peers
read and a landing place for what is read of theirs.
"""

import asyncio
import logging
import time
from math import inf

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import TransferFailed
from pdserve.transfer.base import ReadPlan
from pdserve.transfer.memory import KVMemory
from pdserve.transfer.pump import Flight, TransferPump
from pdserve.transfer.speed import LARGE_BYTES, SMALL_BYTES, LinkSpeed

PROBE_AREA_BYTES = 2 * LARGE_BYTES
PROBE_DEADLINE = 1.0
"""Seconds one read of a probe may take."""

READS = 3
"""Reads of each size; the fastest one counts, the others met a busy machine or untouched memory."""

HOPELESS = 4.0
"""A read that takes so many times as long as another backend's is not repeated."""

_log = logging.getLogger(__name__)


def probe_pattern(epoch: int) -> NDArray[np.uint8]:
    """LARGE_BYTES bytes that belong to one incarnation."""
    return np.random.default_rng(epoch).integers(0, 256, LARGE_BYTES, dtype=np.uint8)


class Prober:
    """Probes of one worker, one at a time."""

    def __init__(self, memory: KVMemory, kv_bytes: int, epoch: int) -> None:
        """kv_bytes at the memory's start belong to the KV."""
        self.memory = memory
        self.offset: int | None = None
        """Where peers find our pattern; None when the memory has no room for one."""
        if memory.nbytes >= kv_bytes + PROBE_AREA_BYTES:
            self.offset = kv_bytes
            memory.write(self.offset, probe_pattern(epoch))
        self._turn = asyncio.Lock()
        self._landing: asyncio.Future[str] | None = None
        """The last read; until it is over it may still write."""

    async def measure(
        self, pump: TransferPump, peer_id: str, remote_offset: int, epoch: int, fastest: float | None
    ) -> LinkSpeed | None:
        """How fast a peer's pattern comes, None when that cannot be measured now.

        fastest is the best time of LARGE_BYTES over another backend. Raises TransferFailed when the pattern does not
        come within PROBE_DEADLINE, or not as it is.
        """
        async with self._turn:
            if self.offset is None or (self._landing is not None and not self._landing.done()):
                return None
            expected = probe_pattern(epoch)
            small = large = inf
            for _ in range(READS):
                small = min(small, await self._read(pump, peer_id, remote_offset, expected[:SMALL_BYTES]))
                large = min(large, await self._read(pump, peer_id, remote_offset, expected))
                if fastest is not None and large > HOPELESS * fastest:
                    break
            return LinkSpeed.measured(small, large)

    async def _read(self, pump: TransferPump, peer_id: str, remote_offset: int, expected: NDArray[np.uint8]) -> float:
        """Seconds until the bytes were there."""
        assert self.offset is not None
        loop, ours = asyncio.get_running_loop(), self.offset + LARGE_BYTES
        local, remote, lengths = (np.array([n], dtype=np.uint64) for n in (ours, remote_offset, len(expected)))
        self.memory.write(ours, ~expected)
        self._landing = landing = loop.create_future()
        plan = ReadPlan(local=local, remote=remote, lengths=lengths)
        flight = Flight(peer_id, plan, lambda error: _tell(loop, landing, error))
        begun = time.perf_counter()
        pump.post(flight)
        try:
            error = await asyncio.wait_for(asyncio.shield(landing), PROBE_DEADLINE)
        except TimeoutError:
            raise TransferFailed(f"no answer to a probe within {PROBE_DEADLINE:g} s") from None
        finally:
            flight.abandon()
        seconds = time.perf_counter() - begun
        if error:
            raise TransferFailed(error)
        (arrived,) = self.memory.chunks(local, lengths)
        if not np.array_equal(arrived, expected):
            _log.warning("the %s backend delivers other bytes than %s holds; it is not used", pump.name, peer_id)
            raise TransferFailed("the bytes of a probe arrived damaged")
        return seconds


def _tell(loop: asyncio.AbstractEventLoop, landing: "asyncio.Future[str]", error: str) -> None:
    """From the pump's thread; a closed loop has nobody left to tell."""

    def set_result() -> None:
        if not landing.done():
            landing.set_result(error)

    if not loop.is_closed():
        loop.call_soon_threadsafe(set_result)
