"""What other routers have booked on the engines: told as it happens, and whole with every heartbeat.

News are lost whenever somebody is away, so what is told is state and not difference: each engine's share of a request
as it is now, or that there is none any more. A router that is silent is forgotten after a lease.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from pdserve.core.clock import Clock
from pdserve.core.cluster import EngineKey, Share
from pdserve.core.msgpack import unpack
from pdserve.dispatch.ledger import EngineLedger

GATHER = 0.01
"""Seconds for which changes are gathered into one message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BookingNews:
    """Of one router. whole: everything it has booked, else what has changed: None for what it has no more."""

    router: str
    whole: bool
    shares: tuple[tuple[EngineKey, str, Share | None], ...]


_DECODER = msgspec.msgpack.Decoder(BookingNews)


class OtherRouters:
    """Both directions: this router's bookings out, the others' into the ledgers."""

    def __init__(
        self,
        router: str,
        ledgers: Callable[[], Mapping[EngineKey, EngineLedger]],
        clock: Clock,
        lease: float,
        send: Callable[[bytes], None],
    ) -> None:
        """router: this one's name. send must not block, and may lose what it is given."""
        self._router = router
        self._ledgers = ledgers
        self._clock = clock
        self._lease = lease
        self._send = send
        self._changed: set[tuple[EngineKey, str]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._heard: dict[str, float] = {}
        """Other router → when (monotonic) it last told everything."""

    @property
    def num_known(self) -> int:
        """Other routers that are heard from."""
        return len(self._heard)

    def booked(self, key: EngineKey, request_id: str) -> None:
        """This router's booking of a request on an engine has changed."""
        self._changed.add((key, request_id))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER, self._tell_changes)

    def tell_all(self) -> None:
        """For those who have missed something; also the sign of life."""
        ledgers = self._ledgers()
        self._tell(
            (key, request_id, share) for key, ledger in ledgers.items() for request_id, share in ledger.shares().items()
        )
        self.forget_silent()

    def forget_silent(self) -> None:
        """To be called while nothing can be told, too: what ends then is not heard of."""
        now = self._clock.monotonic()
        for router in [router for router, at in self._heard.items() if now - at > self._lease]:
            del self._heard[router]
            for ledger in self._ledgers().values():
                ledger.others_hold(router, {})

    def take(self, news: bytes) -> None:
        """What a router has told. Raises MalformedMessage."""
        told = unpack(news, _DECODER)
        if told.router == self._router:
            return
        ledgers = self._ledgers()
        if told.whole:
            self._heard[told.router] = self._clock.monotonic()
            wholes: dict[EngineKey, dict[str, Share]] = {key: {} for key in ledgers}
            for key, request_id, share in told.shares:
                if key in wholes and share is not None:
                    wholes[key][request_id] = share
            for key, shares in wholes.items():
                ledgers[key].others_hold(told.router, shares)
        elif told.router in self._heard:
            for key, request_id, share in told.shares:
                if ledger := ledgers.get(key):
                    ledger.others_booked(told.router, request_id, share)

    def _tell_changes(self) -> None:
        self._timer = None
        changed, self._changed = self._changed, set()
        ledgers = self._ledgers()
        shares = ((key, request_id, ledgers[key].share(request_id)) for key, request_id in changed if key in ledgers)
        self._tell(shares, whole=False)

    def _tell(self, shares: Iterable[tuple[EngineKey, str, Share | None]], *, whole: bool = True) -> None:
        news = BookingNews(router=self._router, whole=whole, shares=tuple(shares))
        self._send(msgspec.msgpack.encode(news))
