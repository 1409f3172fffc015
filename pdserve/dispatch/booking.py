"""What one request takes of engines, from its route to its end."""

from collections.abc import Mapping
from dataclasses import replace

from pdserve.core.cluster import EngineKey, Reservation, Route
from pdserve.core.endpoint import Endpoint
from pdserve.core.request import Request
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.links import LostLinks
from pdserve.router.rebalancing import DecodingRequest


class Booking:
    """The load of one request on the engines of its route, until release."""

    def __init__(
        self, ledgers: Mapping[EngineKey, EngineLedger], request: Request, route: Route, links: LostLinks
    ) -> None:
        self._ledgers = ledgers
        self._links = links
        self._reservation = Reservation(
            request_id=request.id,
            prefill=(route.prefill.engine_id, route.prefill.epoch),
            decode=(route.decode.engine_id, route.decode.epoch),
            prompt_tokens=len(request.prompt_token_ids),
            uncached_tokens=route.uncached_tokens,
            max_tokens=request.sampling.max_tokens,
        )
        self._decoding = self._reservation
        """Its decode share, as the engine knows the request that has it."""
        self._shares = {(key, request.id) for key in (self._reservation.prefill, self._reservation.decode)}
        """Engines that have, or had, a share of it, and what they call the request."""
        for key, _ in self._shares:
            if ledger := ledgers.get(key):
                ledger.book(self._reservation)
        self._first = ledgers.get(self._reservation.decode)
        links.tried(route.link)
        if route.fetch_link:
            links.tried(route.fetch_link)

    def move(self, decode: Endpoint, request: Request | None = None, source: EngineKey | None = None) -> None:
        """Exchange the decode engine's share for one on another decode engine, in one go. request: what is left of it,
        as it is submitted there; source: where that fetches KV from. Unless given, it is the request that was booked,
        and the prefill engine."""
        if ledger := self._ledgers.get(self._decoding.decode):
            ledger.suspend_decode(self._decoding.request_id)
        self._decoding = replace(self._decoding, decode=(decode.engine_id, decode.epoch))
        if request:
            self._decoding = replace(
                self._decoding,
                request_id=request.id,
                prompt_tokens=len(request.prompt_token_ids),
                max_tokens=request.sampling.max_tokens,
            )
        self._shares.add((self._decoding.decode, self._decoding.request_id))
        if ledger := self._ledgers.get(self._decoding.decode):
            ledger.book_decode(self._decoding)
        self._links.tried((source or self._decoding.prefill, self._decoding.decode))

    @property
    def numerics(self) -> str:
        """Of the engine that was to decode when it was booked, also when that has left; empty when it never told."""
        return self._first.numerics if self._first else ""

    @property
    def decoding(self) -> DecodingRequest | None:
        """As its decode engine's ledger has it; None when that has left."""
        ledger = self._ledgers.get(self._decoding.decode)
        return ledger.decoding(self._decoding.request_id) if ledger else None

    def release(self) -> None:
        for key, request_id in self._shares:
            if ledger := self._ledgers.get(key):
                ledger.release(request_id)
