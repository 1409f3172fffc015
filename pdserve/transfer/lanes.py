"""The memory of one rank of a peer over each backend both sides have.

A lane is one backend's connection to one incarnation of a peer::

    UNTRIED ──connected, probed──▶ HEALTHY ──a read ends with an error──▶ BROKEN ──connected again──▶ HEALTHY
       └──────────fails──────────▶ left out

Pulls use healthy lanes in the order of their speed, then broken ones, which are connected again first. A lane that
has been broken for RETRY seconds gets its old place back, for a pull to try it.

A broken lane may have reads under way that fare well, and is connected again only when they have ended. A pull with no
other lane left waits for that, for CONNECT_DEADLINE at most; reads past their deadlines may never end, and are not
waited for.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from pdserve.core.errors import TransferError, TransferFailed
from pdserve.core.layout import KVOrder
from pdserve.core.msgpack import unpack
from pdserve.core.protocols import PeerAddress, RankAddress
from pdserve.transfer.digest import DigestKind
from pdserve.transfer.probe import Prober
from pdserve.transfer.pump import Flight, TransferPump
from pdserve.transfer.speed import LARGE_BYTES, LinkSpeed, by_preference

CONNECT_DEADLINE = 5.0
"""Seconds a backend may take to make a peer readable."""

_IN_USE = "other reads over it have not ended"

RETRY = 30.0
"""Seconds a broken lane comes last where there are others."""


class Offer(msgspec.Struct, frozen=True):
    """One backend's entry in a RankAddress: how the rank's blocks lie, how it digests them, the backend's own
    metadata, and where the probe pattern is (in bytes from the memory's start), if there is one."""

    num_blocks: Annotated[int, msgspec.Meta(gt=0, lt=2**32)]
    order: KVOrder
    digest: DigestKind
    metadata: bytes
    probe_offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)] | None = None


OFFER = msgspec.msgpack.Decoder(Offer)


@dataclass(slots=True, eq=False)
class Lane:
    """speed is what the probe measured, None without one; broken_at is monotonic, None while it is healthy."""

    pump: TransferPump
    key: str
    offer: Offer
    speed: LinkSpeed | None = None
    broken_at: float | None = None
    _mending: asyncio.Lock = field(default_factory=asyncio.Lock)
    _reads: set[Flight] = field(default_factory=set)
    _quiet: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.pump.name

    @property
    def form(self) -> tuple[int, KVOrder, DigestKind]:
        """How the peer's blocks lie and are digested."""
        return self.offer.num_blocks, self.offer.order, self.offer.digest

    async def connect(self) -> None:
        """Make the peer readable over this lane. Raises TransferFailed."""
        try:
            begun = self.pump.connect(self.key, self.offer.metadata)
            async with asyncio.timeout(CONNECT_DEADLINE):
                reached = await asyncio.wrap_future(begun)
                await asyncio.wrap_future(reached)
        except TimeoutError:
            raise TransferFailed("no answer") from None
        self.broken_at = None

    async def mend(self, *, patient: bool) -> None:
        """Connect again if a read failed since the last time; while somebody waits for a read under way, that is
        refused, or else done afterwards. Raises TransferFailed."""
        if self.in_use and not patient:
            raise TransferFailed(_IN_USE)
        async with self._mending:
            try:
                async with asyncio.timeout(CONNECT_DEADLINE):
                    while self.in_use:
                        await self._quiet.wait()
            except TimeoutError:
                raise TransferFailed(_IN_USE) from None
            if self.broken_at is not None:
                await self.connect()

    def begin(self, read: Flight) -> None:
        self._reads.add(read)
        self._quiet.clear()

    def end(self, read: Flight) -> None:
        """It is over, or nobody waits for it any more."""
        self._reads.discard(read)
        if not self._reads:
            self._quiet.set()

    @property
    def in_use(self) -> bool:
        """Whether it is broken and has reads under way for which somebody waits."""
        return self.broken_at is not None and bool(self._reads)


def in_order(lanes: Sequence[Lane], now: float) -> list[Lane]:
    """The lanes as a pull should try them, given in the order of their speed."""
    return sorted(lanes, key=lambda lane: lane.broken_at is not None and now - lane.broken_at < RETRY)


async def mend_lanes(lanes: Sequence[Lane]) -> None:
    """Connect broken lanes again; those with reads under way only if that works for none of the others. Raises
    TransferFailed when it works for none."""
    failures: list[BaseException] = []
    for some in ([lane for lane in lanes if not lane.in_use], [lane for lane in lanes if lane.in_use]):
        mending = (lane.mend(patient=True) for lane in some)
        ended = await asyncio.gather(*mending, return_exceptions=True)
        if None in ended:
            return
        failures += filter(None, ended)
    raise failures[0]


async def open_lanes(
    peer: PeerAddress, rank: RankAddress, pumps: tuple[TransferPump, ...], prober: Prober
) -> list[Lane]:
    """Every lane that reaches a rank of the peer, the one to use first first. Raises TransferFailed when there is
    none."""
    offers, key = dict(rank.backends), f"{peer.engine_id}/{peer.epoch:016x}/{rank.shard.rank}"
    common = [pump for pump in pumps if pump.name in offers]
    lanes, failures = list[Lane](), list[str]()
    try:
        opening = (_open(pump, key, offers[pump.name]) for pump in common)
        opened = await asyncio.gather(*opening, return_exceptions=True)
        for pump, lane in zip(common, opened, strict=True):
            try:
                if isinstance(lane, BaseException):
                    raise lane
                if len(common) > 1:
                    await _try_out(lane, lanes, prober, peer.epoch)
                lanes.append(lane)
            except TransferError as error:
                failures.append(f"{pump.name}: {error}")
                pump.disconnect(key)
    except BaseException:
        for pump in common:
            pump.disconnect(key)
        raise
    if not lanes:
        ours = ", ".join(pump.name for pump in pumps)
        reasons = "; ".join(failures) or f"it offers {', '.join(offers) or 'none'}, this worker has {ours}"
        raise TransferFailed(f"no transfer backend reaches {peer.engine_id}: {reasons}")
    return [lanes[index] for index in by_preference(tuple(lane.speed for lane in lanes))]


async def _try_out(lane: Lane, others: Sequence[Lane], prober: Prober, epoch: int) -> None:
    """Measure a lane's speed. Raises TransferFailed when it is of no use beside the others."""
    if others and lane.form != others[0].form:
        raise TransferFailed(f"it describes the blocks otherwise than {others[0].name}")
    if lane.offer.probe_offset is not None:
        fastest = min((other.speed.seconds(LARGE_BYTES) for other in others if other.speed), default=None)
        lane.speed = await prober.measure(lane.pump, lane.key, lane.offer.probe_offset, epoch, fastest)


async def _open(pump: TransferPump, key: str, offer: bytes) -> Lane:
    lane = Lane(pump, key, unpack(offer, OFFER))
    await lane.connect()
    return lane
