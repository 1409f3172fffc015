"""Checks of pairs over gRPC: what an engine answers, and how it asks a source."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import msgspec

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.errors import LayoutMismatch, LinkLost, MalformedMessage, PdserveError, StaleEpoch, TransferFailed
from pdserve.core.pair_check import MachineFacts, PairCheck
from pdserve.core.protocols import PeerAddress
from pdserve.core.shards import KVPart
from pdserve.engine.pair_checker import PairChecker, Pattern
from pdserve.rpc import convert
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1 import pair_check_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import HandoffServiceStub
from pdserve.rpc.generated.pdserve.v1.pair_check_pb2_grpc import PairCheckServiceServicer, PairCheckServiceStub

PINGS = 9

_CheckContext = grpc.aio.ServicerContext[pb.CheckPairRequest, Awaitable[pb.CheckPairResponse]]
_PatternContext = grpc.aio.ServicerContext[pb.PatternRequest, AsyncIterator[pb.PatternOffer]]
_PingContext = grpc.aio.ServicerContext[pb.PingRequest, Awaitable[pb.PingResponse]]


class PairCheckService(PairCheckServiceServicer):
    def __init__(self, checker: PairChecker, times: Times) -> None:
        self._checker = checker
        self._times = times

    async def CheckPair(self, request: pb.CheckPairRequest, context: _CheckContext) -> pb.CheckPairResponse:
        source = GrpcSource(
            request.source_id, request.source_epoch, request.source_address, self._times, self._checker.engine.clock
        )
        check = PairCheck(source=request.source_id, target=self._checker.engine.endpoint.engine_id)
        async with source:
            try:
                check = await source.ping(check)
                peer = await source.shake_hands(self._checker.engine.transfer.address, self._checker.kv_kind)
                check = await self._checker.measure(check, peer, source)
            except PdserveError as error:
                check = replace(check, error=(error.code, str(error)))
        return pb.CheckPairResponse(check_json=msgspec.json.encode(check).decode())

    async def OfferPattern(
        self, request: pb.PatternRequest, context: _PatternContext
    ) -> AsyncIterator[pb.PatternOffer]:
        try:
            parts = convert.parts_from_proto(request.parts)
            async with self._checker.pattern(request.source_epoch, request.most_blocks, request.seed, parts) as pattern:
                yield _offer(pattern)
                # The target ends the call when it has read; should it die, gRPC does.
                await asyncio.sleep(self._times.pair_check)
        except PdserveError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def Ping(self, request: pb.PingRequest, context: _PingContext) -> pb.PingResponse:
        return pb.PingResponse(unix_seconds=self._checker.engine.clock.unix())


class GrpcSource:
    """Implements pair_checker.PatternSource. Use as a context manager."""

    def __init__(self, engine_id: str, epoch: int, address: str, times: Times, clock: Clock) -> None:
        self._engine_id, self._epoch = engine_id, epoch
        self._times, self._clock = times, clock
        self._channel = open_channel(address)
        self._stub = PairCheckServiceStub(self._channel)

    async def __aenter__(self) -> "GrpcSource":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()

    async def ping(self, check: PairCheck) -> PairCheck:
        """Adds the round trip and the clocks' difference. Raises LinkLost."""
        trips, offsets = [], []
        try:
            await self._stub.Ping(pb.PingRequest(), timeout=self._times.suspect, wait_for_ready=True)
            for _ in range(PINGS):
                sent, sent_unix = self._clock.monotonic(), self._clock.unix()
                answer = await self._stub.Ping(pb.PingRequest(), timeout=self._times.suspect)
                trips.append(self._clock.monotonic() - sent)
                offsets.append(answer.unix_seconds - sent_unix - trips[-1] / 2)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from None
        return replace(check, round_trip=statistics.median(trips), clock_offset=statistics.median(offsets))

    async def shake_hands(self, ours: PeerAddress, kv_kind: str) -> PeerAddress:
        """The source's address for our transfer service. Raises TransferError."""
        hello = convert.peer_to_proto(ours)
        hello.kv_kind = kv_kind
        try:
            answer = await HandoffServiceStub(self._channel).Connect(hello, timeout=self._times.suspect)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise LayoutMismatch(error.details() or "the source holds KV of another layout") from None
            raise self._translate(error) from None
        if answer.epoch != self._epoch:
            raise StaleEpoch(f"{self._engine_id} has restarted since it was asked for")
        return convert.peer_from_proto(answer)

    @asynccontextmanager
    async def pattern(self, most_blocks: int, seed: int, parts: Sequence[KVPart]) -> AsyncIterator[Pattern]:
        request = pb.PatternRequest(
            source_epoch=self._epoch, most_blocks=most_blocks, seed=seed, parts=map(convert.part_to_proto, parts)
        )
        call = self._stub.OfferPattern(request, timeout=self._times.pair_check)
        try:
            offer = await call.read()
            if not isinstance(offer, pb.PatternOffer):
                raise LinkLost(f"{self._engine_id} ended the call without a pattern")
            yield _pattern(offer, len(parts))
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from None
        finally:
            call.cancel()

    def _translate(self, error: grpc.aio.AioRpcError) -> PdserveError:
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            return TransferFailed(f"{self._engine_id}: {error.details()}")
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return TransferFailed(f"{self._engine_id} runs a version of pdserve that cannot be checked")
        return LinkLost(f"{self._engine_id} cannot be reached ({error.code().name.lower().replace('_', ' ')})")


def _offer(pattern: Pattern) -> pb.PatternOffer:
    digests = [
        pb.PatternDigest(num_blocks=count, part=part, digest=digest)
        for count, of_parts in pattern.digests.items()
        for part, digest in enumerate(of_parts)
    ]
    return pb.PatternOffer(
        blocks=pattern.blocks, digests=digests, facts_json=msgspec.json.encode(pattern.facts).decode()
    )


def _pattern(offer: pb.PatternOffer, num_parts: int) -> Pattern:
    """Raises MalformedMessage."""
    digests: dict[int, dict[int, bytes]] = {}
    for one in offer.digests:
        digests.setdefault(one.num_blocks, {})[one.part] = one.digest
    whole = all(sorted(of_parts) == list(range(num_parts)) for of_parts in digests.values())
    if not whole or not all(0 < count <= len(offer.blocks) for count in digests):
        raise MalformedMessage("the digests of a pattern do not fit its blocks and parts")
    try:
        facts = msgspec.json.decode(offer.facts_json, type=MachineFacts)
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"the facts of a source are malformed: {error}") from error
    return Pattern(
        blocks=tuple(offer.blocks),
        digests={count: tuple(of_parts[i] for i in range(num_parts)) for count, of_parts in digests.items()},
        facts=facts,
    )
