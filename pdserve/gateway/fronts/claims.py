"""A front's claims on keyed requests: those of its gateway, which all fronts share."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import msgspec

from pdserve.core.errors import Unavailable
from pdserve.gateway.fronts.messages import AwaitChange, Claim, Claimed, Finish, Release
from pdserve.gateway.fronts.remote import GatewayLine
from pdserve.shared.claims import Busy, Kept, Mine

_CLAIMED = msgspec.msgpack.Decoder(Claimed)
_NOTHING = msgspec.msgpack.Decoder(None)


class RemoteClaims:
    """shared.claims.Claims over the line to the gateway.

    While it is lost, claim and changed raise Unavailable; nothing is left to finish or release, for claims end with
    their front's line."""

    def __init__(self, line: GatewayLine) -> None:
        self._line = line

    @property
    def on_taken(self) -> Callable[[str, str], None]:
        return self._line.on_taken

    @on_taken.setter
    def on_taken(self, told: Callable[[str, str], None]) -> None:
        self._line.on_taken = told

    async def claim(self, name: str, owner: str, fingerprint: bytes) -> Mine | Busy | Kept:
        try:
            claimed = await self._line.call(Claim(name, owner, fingerprint), _CLAIMED)
        except asyncio.CancelledError:
            # The answer may be on its way: nobody would execute what it gives.
            self._line.order(Release(name, owner))
            raise
        if claimed.kept is not None:
            return Kept(claimed.kept)
        return Mine() if claimed.busy is None else Busy(claimed.busy)

    async def finish(self, name: str, owner: str, result: bytes) -> None:
        with suppress(Unavailable):
            await self._line.call(Finish(name, owner, result), _NOTHING)

    async def release(self, name: str, owner: str) -> None:
        with suppress(Unavailable):
            await self._line.call(Release(name, owner), _NOTHING)

    async def changed(self, name: str, timeout: float) -> None:
        await self._line.call(AwaitChange(name, timeout), _NOTHING)
