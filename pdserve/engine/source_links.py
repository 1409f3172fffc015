"""An engine's links to those it reads KV from: one per incarnation, opened when a ticket or a hint first names it.

    opening ──▶ open ──lost──▶ MENDING ──opened again──▶ open
                                  └──nobody asks any more──▶ forgotten

Which of two incarnations of an engine is the later one, their epochs do not tell; the one that answers lives. So the
link to one stays until that to another has opened: a ticket that comes late must not end what is read meanwhile.

A link that was lost is opened again in the background. Until that has worked, whatever needs it is refused
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
from pdserve.engine.source_link import OpenLink, SourceLink, SourceName

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Mending:
    """The source, when it was last refused (monotonic), and the work."""

    source: SourceName
    asked_at: float
    task: asyncio.Task[None] | None = None


class SourceLinks:
    """disconnect(engine_id) lets the transfer service forget a peer whose connection may be as dead as the link."""

    def __init__(
        self,
        *,
        open_link: OpenLink,
        disconnect: Callable[[str], Awaitable[None]],
        times: Times,
        clock: Clock,
    ) -> None:
        self._open_link = open_link
        self._disconnect = disconnect
        self._times = times
        self._clock = clock
        self._listeners: list[Callable[[SourceLink, PdserveError], None]] = []
        self._links: dict[tuple[str, int], SourceLink] = {}
        """By engine id and epoch."""
        self._mending: dict[str, _Mending] = {}
        """By engine id: of an engine with another link none is mended."""
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, listener: Callable[[SourceLink, PdserveError], None]) -> None:
        """listener(link, error) is called once for each link that was handed out and fails."""
        self._listeners.append(listener)

    def to(self, source: SourceName) -> SourceLink:
        """The link, perhaps still opening. Raises LinkLost while it is being mended."""
        mending = self._mending.get(source.engine_id)
        if mending and mending.source.epoch == source.epoch:
            mending.asked_at = self._clock.monotonic()
            raise LinkLost(f"{source.engine_id} cannot be reached; it is tried again")
        link = self._links.get((source.engine_id, source.epoch))
        if link:
            return link
        if mending:
            self._stop_mending(source.engine_id)
        link = self._links[source.engine_id, source.epoch] = self._open(source)
        self._keep(self._replace_others(link))
        return link

    async def close(self) -> None:
        for engine_id in list(self._mending):
            self._stop_mending(engine_id)
        # No link is mended that is not among these.
        links, self._links = self._links, {}
        for link in links.values():
            self._keep(link.close())
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _open(self, source: SourceName) -> SourceLink:
        def failed(error: PdserveError) -> None:
            self._drop(source, link, error)
            for listener in self._listeners:
                listener(link, error)

        link = self._open_link(source, failed)
        link.start()
        return link

    def _drop(self, source: SourceName, link: SourceLink, error: PdserveError) -> None:
        """A link has failed: nobody gets it any more."""
        if self._links.get((link.engine_id, link.epoch)) is not link:
            return
        del self._links[link.engine_id, link.epoch]
        self._keep(link.close())
        if isinstance(error, LinkLost) and not self._others(link):
            self._mend(source, error)

    def _others(self, link: SourceLink) -> list[tuple[str, int]]:
        """The links to other incarnations of its engine."""
        return [key for key in self._links if key[0] == link.engine_id and key[1] != link.epoch]

    async def _replace_others(self, link: SourceLink) -> None:
        """Once a link has opened, this is the incarnation that lives."""
        with suppress(PdserveError):
            await link.ready()
            for key in self._others(link):
                self._keep(self._links.pop(key).close())

    def _mend(self, source: SourceName, error: LinkLost) -> None:
        _log.warning("link lost, opening it again", source=source.engine_id, epoch=source.epoch, cause=str(error))
        mending = self._mending[source.engine_id] = _Mending(source, self._clock.monotonic())
        mending.task = self._keep(self._until_mended(mending))

    def _stop_mending(self, engine_id: str) -> None:
        task = self._mending.pop(engine_id).task
        if task:
            task.cancel()

    async def _until_mended(self, mending: _Mending) -> None:
        source, lost_at = mending.source.engine_id, self._clock.monotonic()
        try:
            with suppress(PdserveError):
                await self._disconnect(source)
            link = await self._opened_again(mending)
        finally:
            if self._mending.get(source) is mending:
                del self._mending[source]
        if link:
            self._links[source, link.epoch] = link
            seconds = round(self._clock.monotonic() - lost_at, 1)
            _log.info("link works again", source=source, epoch=link.epoch, after_seconds=seconds)

    async def _opened_again(self, mending: _Mending) -> SourceLink | None:
        """None when its source has restarted, or when nobody asks for it any more."""
        while self._clock.monotonic() - mending.asked_at < self._times.link_forgotten:
            try:
                return await self._opened(mending.source)
            except (StaleEpoch, LayoutMismatch):
                return None
            except PdserveError:
                await self._clock.sleep(self._times.heartbeat)
        return None

    async def _opened(self, source: SourceName) -> SourceLink:
        link = self._open(source)
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
