"""The verified pulls of one ticket's regions: what a target does with RegionReady, whatever the KV is for."""

import asyncio
from collections.abc import Callable, Mapping

import structlog

from pdserve.core.errors import LeaseExpired, PdserveError, TransferFailed
from pdserve.core.failpoints import reach
from pdserve.core.protocols import Pull, PullReceipt, PullSpec, TransferService
from pdserve.core.shards import KVPart
from pdserve.core.ticket import RegionReady, region_seed
from pdserve.engine.source_link import SourceLink

_log = structlog.get_logger(__name__)


class RegionPulls:
    """One pull per region, whose every read starts only while the lease surely holds, for blocks that no pull was
    started for.

    targets: logical block index → target block. on_end hears how each pull ended, until `unwatch`.
    """

    def __init__(
        self,
        *,
        ticket_id: str,
        link: SourceLink,
        parts: tuple[KVPart, ...],
        targets: Mapping[int, int],
        transfer: TransferService,
        deadline: float,
        on_end: Callable[[PullReceipt | PdserveError], None],
    ) -> None:
        self._ticket_id = ticket_id
        self._link = link
        self._parts = parts
        self._targets = targets
        self._transfer = transfer
        self._deadline = deadline
        self._on_end = on_end
        self._unoffered: set[tuple[int, KVPart | None]] = {(index, part) for index in targets for part in parts}
        self._in_flight: dict[Pull, tuple[int, ...]] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self.missing = len(self._unoffered)
        """Parts of blocks that are not verified yet."""

    @property
    def unsettled(self) -> tuple[int, ...]:
        """Target blocks that a pull may still write to."""
        return tuple(dict.fromkeys(block for targets in self._in_flight.values() for block in targets))

    def forgo(self, first: int) -> None:
        """No region will bring the blocks from this logical index on, and none is needed."""
        forgone = {(index, part) for index, part in self._unoffered if index >= first}
        self._unoffered -= forgone
        self.missing -= len(forgone)

    def verified_below(self, first: int) -> bool:
        """Whether all blocks below this logical index are here, and no pull is under way."""
        return not self._in_flight and all(index >= first for index, _ in self._unoffered)

    def start(self, region: RegionReady) -> None:
        """Raises LeaseExpired, or TransferFailed for a region that was not asked for."""
        link = self._link
        lease_left = link.lease_left(self._ticket_id)
        if lease_left <= 0:
            raise LeaseExpired(f"the lease of {link.engine_id} was not renewed in time to read")
        logical = range(region.first_block, region.first_block + len(region.source_blocks))
        offered = {(index, region.part) for index in logical}
        if not offered <= self._unoffered:
            raise TransferFailed(f"{link.engine_id} offered blocks that were not asked for, or twice")
        self._unoffered -= offered
        targets = tuple(self._targets[index] for index in logical)
        reach("transferring")
        pull = self._transfer.pull(
            PullSpec(
                peer=link.engine_id,
                epoch=link.epoch,
                source_blocks=region.source_blocks,
                target_blocks=targets,
                digest=region.digest,
                seed=region_seed(self._ticket_id, link.epoch, region.first_block, region.part),
                deadline=self._deadline,
                start_within=lease_left,
                part=region.part,
            )
        )
        self._in_flight[pull] = targets
        self._watchers.append(asyncio.get_running_loop().create_task(self._watch(pull)))

    def unwatch(self) -> None:
        """Nobody waits for pulls any more; those in flight go on."""
        for watcher in self._watchers:
            watcher.cancel()

    def cancel(self) -> None:
        for pull in self._in_flight:
            pull.cancel()

    async def settled(self) -> None:
        """Returns when no pull in flight writes any more, however long that takes."""
        for pull in list(self._in_flight):
            await pull.settled()

    async def _watch(self, pull: Pull) -> None:
        try:
            receipt = await pull.wait()
        except PdserveError as error:
            if isinstance(error, TransferFailed):
                self._link.distrust()
            self._on_end(error)
            return
        except Exception:
            _log.exception("pull failed internally", ticket=self._ticket_id)
            self._on_end(TransferFailed("a pull failed internally; the log has the details"))
            return
        self.missing -= len(self._in_flight.pop(pull))
        self._on_end(receipt)
