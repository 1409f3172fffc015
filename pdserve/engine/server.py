"""The gRPC face of an engine: sessions for gateways and the supervisor, KV for other engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress

import grpc
import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.errors import MalformedMessage, PdserveError
from pdserve.core.protocols import TransferService
from pdserve.core.ticket import HandoffDone, HandoffNews, Lent, RegionReady, TicketGone
from pdserve.engine.engine import Engine
from pdserve.engine.handoff_link import HandoffLink
from pdserve.engine.handoff_source import Deliver
from pdserve.engine.pair_check_service import PairCheckService
from pdserve.engine.pair_checker import PairChecker
from pdserve.engine.role_service import RoleService
from pdserve.engine.session import EngineSession
from pdserve.engine.source_link import OpenLink, SourceName
from pdserve.rpc import convert
from pdserve.rpc.channel import new_server
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1 import engine_pb2_grpc as pb_grpc
from pdserve.rpc.generated.pdserve.v1.pair_check_pb2_grpc import add_PairCheckServiceServicer_to_server
from pdserve.rpc.generated.pdserve.v1.scaler_pb2_grpc import add_RoleServiceServicer_to_server

_log = structlog.get_logger(__name__)

_SessionContext = grpc.aio.ServicerContext[AsyncIterator[pb.SessionCommands], AsyncIterator[pb.SessionEvents]]
_DrainContext = grpc.aio.ServicerContext[pb.DrainRequest, Awaitable[pb.DrainResponse]]
_ConnectContext = grpc.aio.ServicerContext[pb.PeerHello, Awaitable[pb.PeerHello]]
_HandoffContext = grpc.aio.ServicerContext[AsyncIterator[pb.HandoffCommand], AsyncIterator[pb.HandoffEvent]]


class EngineServer:
    """A listening server; the address is known before the engine exists, for its tickets to name."""

    def __init__(self, host: str, port: int = 0) -> None:
        self._server = new_server()
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.address = f"{host}:{self.port}"

    async def start(
        self,
        engine: Engine,
        times: Times,
        checker: PairChecker | None = None,
        roles: Mapping[Role, EngineLimits] | None = None,
    ) -> None:
        """With a checker, the ways to other engines can be checked. roles: those the engine may take, each with its
        limits."""
        pb_grpc.add_EngineServiceServicer_to_server(_EngineService(engine, times), self._server)
        pb_grpc.add_HandoffServiceServicer_to_server(HandoffService(engine), self._server)
        if checker:
            add_PairCheckServiceServicer_to_server(PairCheckService(checker, times), self._server)
        if roles:
            add_RoleServiceServicer_to_server(RoleService(engine, roles), self._server)
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """End all streams, waiting at most grace seconds for running calls."""
        await self._server.stop(grace)


def grpc_links(transfer: TransferService, times: Times, clock: Clock) -> OpenLink:
    """Links to other engines' servers, for the Engine that owns the transfer service."""

    def open_link(source: SourceName, on_failure: Callable[[PdserveError], None]) -> HandoffLink:
        return HandoffLink(
            engine_id=source.engine_id,
            epoch=source.epoch,
            address=source.address,
            transfer=transfer,
            times=times,
            clock=clock,
            on_failure=on_failure,
        )

    return open_link


class _EngineService(pb_grpc.EngineServiceServicer):
    def __init__(self, engine: Engine, times: Times) -> None:
        self._engine = engine
        self._times = times

    async def Session(
        self, commands: AsyncIterator[pb.SessionCommands], context: _SessionContext
    ) -> AsyncIterator[pb.SessionEvents]:
        session = EngineSession(self._engine, self._times)
        reader = asyncio.create_task(_obey_all(commands, session))
        try:
            async with aclosing(session.events()) as events:
                async for message in events:
                    yield message
        finally:
            session.close()
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def Drain(self, request: pb.DrainRequest, context: _DrainContext) -> pb.DrainResponse:
        return pb.DrainResponse(drained=await self._engine.drain(request.timeout))


async def _obey_all(messages: AsyncIterator[pb.SessionCommands], session: EngineSession) -> None:
    """A command that cannot be obeyed ends the session: one that lives on deaf would lose every request after it."""
    async for message in messages:
        for command in message.commands:
            try:
                session.obey(command)
            except Exception:
                _log.exception("a session failed internally", command=command.WhichOneof("command"))
                session.end()
                return


class HandoffService(pb_grpc.HandoffServiceServicer):
    """What engines that read KV call: their links, seen from the source."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Connect(self, hello: pb.PeerHello, context: _ConnectContext) -> pb.PeerHello:
        ours = convert.peer_to_proto(self._engine.transfer.address)
        ours.kv_kind = self._engine.transfer.layout.group.kind.value
        if (hello.layout_hash, hello.kv_kind) != (ours.layout_hash, ours.kv_kind):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._engine.endpoint.engine_id} and {hello.engine_id} hold KV of different layouts: "
                "model, KV dtype and block size must be equal",
            )
        return ours

    async def Handoff(
        self, commands: AsyncIterator[pb.HandoffCommand], context: _HandoffContext
    ) -> AsyncIterator[pb.HandoffEvent]:
        outbox: asyncio.Queue[pb.HandoffEvent | None] = asyncio.Queue()
        epoch = self._engine.endpoint.epoch

        def deliver(news: HandoffNews) -> None:
            outbox.put_nowait(_to_event(epoch, news))

        async def read() -> None:
            async for command in commands:
                if command.source_epoch != epoch:
                    break
                try:
                    answer = self._obey(command, deliver)
                except Exception:
                    _log.exception("a link failed internally", command=command.WhichOneof("command"))
                    break
                if answer:
                    outbox.put_nowait(answer)
            outbox.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (event := await outbox.get()) is not None:
                yield event
        finally:
            reader.cancel()
            self._engine.source.detach(deliver)

    def _obey(self, command: pb.HandoffCommand, deliver: Deliver) -> pb.HandoffEvent | None:
        source = self._engine.source
        epoch = self._engine.endpoint.epoch
        match command.WhichOneof("command"):
            case "attach":
                self._attach(command.attach, deliver)
            case "lend":
                self._lend(command.lend, deliver)
            case "caught_up":
                source.caught_up(command.caught_up.ticket_id)
            case "release":
                ticket_id = command.release.ticket_id
                released = pb.Released(ticket_id=ticket_id, expired=source.release(ticket_id))
                return pb.HandoffEvent(source_epoch=epoch, released=released)
            case "heartbeat":
                renewed = source.renew(tuple(command.heartbeat.ticket_ids))
                ack = pb.HeartbeatAck(number=command.heartbeat.number, renewed_ticket_ids=renewed)
                return pb.HandoffEvent(source_epoch=epoch, ack=ack)
        return None

    def _attach(self, attach: pb.Attach, deliver: Deliver) -> None:
        try:
            parts = convert.parts_from_proto(attach.parts)
        except MalformedMessage as error:
            deliver(_refusal(attach.ticket_id, error))
            return
        self._engine.source.attach(attach.ticket_id, attach.first_block, deliver, parts or (None,), bulk=attach.bulk)

    def _lend(self, lend: pb.Lend, deliver: Deliver) -> None:
        try:
            hashes, parts = convert.lend_from_proto(lend)
        except MalformedMessage as error:
            deliver(_refusal(lend.ticket_id, error))
            return
        self._engine.lender.lend(lend.ticket_id, hashes, deliver, parts or (None,))


def _refusal(ticket_id: str, error: PdserveError) -> TicketGone:
    return TicketGone(ticket_id=ticket_id, code=error.code, message=str(error))


def _to_event(epoch: int, news: HandoffNews) -> pb.HandoffEvent:
    match news:
        case RegionReady():
            return pb.HandoffEvent(source_epoch=epoch, region=convert.region_to_proto(news))
        case HandoffDone():
            return pb.HandoffEvent(source_epoch=epoch, done=convert.done_to_proto(news))
        case Lent():
            return pb.HandoffEvent(source_epoch=epoch, lent=convert.lent_to_proto(news))
        case TicketGone():
            return pb.HandoffEvent(source_epoch=epoch, gone=convert.gone_to_proto(news))
