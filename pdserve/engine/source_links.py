"""A decode engine's links to its sources: one per source engine, opened when a ticket first names it.

    opening ──▶ open ──lost──▶ MENDING ──opened again──▶ open
                                  └──nobody asks any more──▶ forgotten

A link that was lost is opened again in the background. Until that has worked, tickets of its source are refused
at once, because a line that swallows everything tells so only by silence, and no request should have to wait for
that a second time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.errors import LayoutMismatch, LinkLost, PdserveError, StaleEpoch
from pdserve.core.ticket import TransferTicket
from pdserve.engine.source_link import OpenLink, SourceLink

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Mending:
    """A ticket that names the source, when one was last refused (monotonic), and the work."""

    ticket: TransferTicket
    asked_at: float
    task: asyncio.Task[None] | None = None


class SourceLinks:
    """on_failure(link, error) is called once for a link that was handed out; disconnect(engine_id) lets the
    transfer service forget a peer whose connection may be as dead as the link."""

    def __init__(
        self,
        *,
        open_link: OpenLink,
        disconnect: Callable[[str], Awaitable[None]],
        times: Times,
        clock: Clock,
        on_failure: Callable[[SourceLink, PdserveError], None],
    ) -> None:
        self._open_link = open_link
        self._disconnect = disconnect
        self._times = times
        self._clock = clock
        self._on_failure = on_failure
        self._links: dict[str, SourceLink] = {}
        self._mending: dict[str, _Mending] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def to_source_of(self, ticket: TransferTicket) -> SourceLink:
        """The link, perhaps still opening. Raises LinkLost while it is being mended."""
        mending = self._mending.get(ticket.engine_id)
        if mending and mending.ticket.epoch == ticket.epoch:
            mending.asked_at = self._clock.monotonic()
            raise LinkLost(f"{ticket.engine_id} cannot be reached; it is tried again")
        link = self._links.get(ticket.engine_id)
        if link and link.epoch == ticket.epoch and link.error is None:
            return link
        if mending:
            self._stop_mending(ticket.engine_id)
        successor = self._links[ticket.engine_id] = self._open(ticket)
        if link:
            self._keep(link.close())
        return successor

    async def close(self) -> None:
        for engine_id in list(self._mending):
            self._stop_mending(engine_id)
        # No link is mended that is not among these.
        links, self._links = self._links, {}
        for link in links.values():
            self._keep(link.close())
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _open(self, ticket: TransferTicket) -> SourceLink:
        def failed(error: PdserveError) -> None:
            if self._links.get(link.engine_id) is link and isinstance(error, LinkLost):
                self._mend(ticket, error)
            self._on_failure(link, error)

        link = self._open_link(ticket, failed)
        link.start()
        return link

    def _mend(self, ticket: TransferTicket, error: LinkLost) -> None:
        _log.warning("link lost, opening it again", source=ticket.engine_id, epoch=ticket.epoch, cause=str(error))
        mending = self._mending[ticket.engine_id] = _Mending(ticket, self._clock.monotonic())
        mending.task = self._keep(self._until_mended(mending))

    def _stop_mending(self, engine_id: str) -> None:
        task = self._mending.pop(engine_id).task
        if task:
            task.cancel()

    async def _until_mended(self, mending: _Mending) -> None:
        source, lost_at = mending.ticket.engine_id, self._clock.monotonic()
        try:
            await self._links.pop(source).close()
            with suppress(PdserveError):
                await self._disconnect(source)
            link = await self._opened_again(mending)
        finally:
            if self._mending.get(source) is mending:
                del self._mending[source]
        if link:
            self._links[source] = link
            seconds = round(self._clock.monotonic() - lost_at, 1)
            _log.info("link works again", source=source, epoch=link.epoch, after_seconds=seconds)

    async def _opened_again(self, mending: _Mending) -> SourceLink | None:
        """None when its source has restarted, or when nobody asks for it any more."""
        while self._clock.monotonic() - mending.asked_at < self._times.link_forgotten:
            try:
                return await self._opened(mending.ticket)
            except (StaleEpoch, LayoutMismatch):
                return None
            except PdserveError:
                await self._clock.sleep(self._times.heartbeat)
        return None

    async def _opened(self, ticket: TransferTicket) -> SourceLink:
        link = self._open(ticket)
        try:
            await link.ready()
        except BaseException:
            await link.close()
            raise
        return link

    def _keep(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
