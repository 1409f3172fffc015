"""A session to one engine: each request gets its own deltas, and a silent or changed engine fails them all."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from pdserve.config.times import Times
from pdserve.core.blocks import KVEvent, KVEventKind, KVSnapshot
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import EngineDied, EngineSilent, Unavailable
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.ticket import Departure, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.connection import EngineConnection
from pdserve.dispatch.ledger import EngineLedger
from pdserve.router.kv_index import BlockHit, KVIndex
from pdserve.router.pool_model import PoolModel
from pdserve.rpc import convert
from pdserve.rpc.channel import new_server
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1 import engine_pb2_grpc as pb_grpc
from tests.clocks import ManualClock

EPOCH = 77


class ScriptedEngine(pb_grpc.EngineServiceServicer):
    """Answers a session with what the test puts into `say`, and notes what it was told."""

    def __init__(self) -> None:
        self.say: asyncio.Queue[pb.SessionEvent] = asyncio.Queue()
        self.told: asyncio.Queue[pb.SessionCommand] = asyncio.Queue()

    async def Session(
        self,
        commands: AsyncIterator[pb.SessionCommands],
        context: grpc.aio.ServicerContext[AsyncIterator[pb.SessionCommands], AsyncIterator[pb.SessionEvents]],
    ) -> AsyncIterator[pb.SessionEvents]:
        async def listen() -> None:
            async for message in commands:
                for command in message.commands:
                    self.told.put_nowait(command)

        listener = asyncio.create_task(listen())
        try:
            while True:
                yield pb.SessionEvents(events=[await self.say.get()])
        finally:
            listener.cancel()

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[pb.DrainRequest, Awaitable[pb.DrainResponse]]
    ) -> pb.DrainResponse:
        return pb.DrainResponse(drained=True)


class Bench:
    """A connection to a scripted engine, on a clock of the test's."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.clock = ManualClock()
        self.index = KVIndex()
        self.ledger = EngineLedger(("d0", EPOCH), self.index, self.clock, PoolModel())
        self.server = new_server()
        pb_grpc.add_EngineServiceServicer_to_server(self.engine, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def connect(self) -> EngineConnection:
        endpoint = Endpoint(
            engine_id="d0",
            role=Role.DECODE,
            epoch=EPOCH,
            address=f"127.0.0.1:{self.port}",
            pid=1,
            state=EngineState.READY,
        )
        return EngineConnection(endpoint, self.ledger, Times(suspect=3.0), self.clock, on_change=lambda: None)

    async def open(self) -> EngineConnection:
        await self.server.start()
        connection = self.connect()
        description = pb.EngineDescription(
            engine_id="d0", epoch=EPOCH, block_size=16, num_blocks=8, max_rows=4, max_tokens_per_step=64
        )
        self.engine.say.put_nowait(pb.SessionEvent(description=description))
        self.engine.say.put_nowait(pb.SessionEvent(load=pb.LoadSnapshot(engine_id="d0", epoch=EPOCH, number=1)))
        while not connection.usable:
            await asyncio.sleep(0.002)
        return connection

    def tokens(self, request_id: str, *token_ids: int, epoch: int = EPOCH, end: str = "") -> None:
        delta = pb.TokenDelta(request_id=request_id, token_ids=token_ids, finish_reason=end)
        self.engine.say.put_nowait(pb.SessionEvent(step=pb.StepEvent(epoch=epoch, deltas=[delta])))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    opened = Bench()
    yield opened
    await opened.server.stop(0)


def ask(request_id: str) -> Request:
    return Request(id=request_id, prompt_token_ids=(1, 2), sampling=SamplingParams(seed=0))


async def test_every_request_gets_its_own_deltas(bench: Bench) -> None:
    connection = await bench.open()
    a, b = connection.submit(ask("a")), connection.submit(ask("b"))
    bench.tokens("b", 5, end="stop")
    bench.tokens("a", 4)
    first = await anext(a)
    assert isinstance(first, TokenDelta)
    assert (first.request_id, first.token_ids) == ("a", (4,))
    assert [d.finish_reason async for d in b if isinstance(d, TokenDelta)] == [FinishReason.STOP]
    await connection.close()


async def test_closing_a_stream_cancels_the_request_on_the_engine(bench: Bench) -> None:
    connection = await bench.open()
    stream = connection.submit(ask("a"))
    assert (await bench.engine.told.get()).submit.request.id == "a"
    await stream.aclose()
    assert (await bench.engine.told.get()).cancel_request_id == "a"
    await connection.close()


async def test_a_stream_that_has_ended_cancels_nothing(bench: Bench) -> None:
    connection = await bench.open()
    stream = connection.submit(ask("a"))
    await bench.engine.told.get()
    bench.tokens("a", 1, end="length")
    await anext(stream)
    await stream.aclose()
    await connection.submit(ask("b")).aclose()
    assert (await bench.engine.told.get()).submit.request.id == "b"
    await connection.close()


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (lambda bench: bench.clock.advance(4.0), EngineSilent, "silent"),
        (lambda bench: bench.server.stop(0), EngineDied, "died"),
    ],
    ids=["frozen", "gone"],
)
async def test_an_engine_that_is_lost_fails_its_requests_and_gets_no_more(
    bench: Bench, fault: Callable[[Bench], Awaitable[None]], kind: type[EngineDied], message: str
) -> None:
    connection = await bench.open()
    stream = connection.submit(ask("a"))
    await fault(bench)
    with pytest.raises(EngineDied, match=message) as caught:
        await anext(stream)
    assert type(caught.value) is kind
    with pytest.raises(EngineDied, match=message):
        await anext(connection.submit(ask("b")))
    assert not connection.usable
    await connection.close()


async def test_engines_are_not_silent_while_the_gateway_stands_still(bench: Bench) -> None:
    connection = await bench.open()
    stream = connection.submit(ask("a"))
    bench.clock.jump(8.0)
    await bench.clock.advance(0.0)
    assert connection.usable
    bench.tokens("a", 1, end="length")
    assert isinstance(await anext(stream), TokenDelta)
    await connection.close()


async def test_tokens_of_another_epoch_are_dropped(bench: Bench) -> None:
    connection = await bench.open()
    stream = connection.submit(ask("a"))
    bench.tokens("a", 9, epoch=EPOCH + 1)
    with pytest.raises(EngineDied, match="restarted"):
        await anext(stream)
    await connection.close()


def stored(number: int, *hashes: bytes, epoch: int = EPOCH) -> pb.SessionEvent:
    event = KVEvent(number=number, kind=KVEventKind.STORED, hashes=hashes)
    return pb.SessionEvent(kv_events=convert.kv_events_to_proto(epoch, [event]))


async def test_a_gap_in_kv_events_is_answered_by_asking_once_for_what_is_missing(bench: Bench) -> None:
    connection = await bench.open()
    chain = [bytes([n]) * 16 for n in range(4)]
    whole = KVSnapshot(number=1, hashes=(chain[0],), first=True, last=True)
    bench.engine.say.put_nowait(pb.SessionEvent(kv_snapshot=convert.kv_snapshot_to_proto(EPOCH, whole)))
    bench.engine.say.put_nowait(stored(2, chain[1]))
    for number in (4, 5):
        bench.engine.say.put_nowait(stored(number, chain[3]))
    assert (await bench.engine.told.get()).resend_kv.after_number == 2
    assert bench.index.match(chain, 0.0) == {("d0", EPOCH): BlockHit(0, 2)}
    for number in (3, 4, 5):
        bench.engine.say.put_nowait(stored(number, chain[number - 1] if number < 5 else chain[3]))
    bench.engine.say.put_nowait(stored(7, chain[3]))
    assert (await bench.engine.told.get()).resend_kv.after_number == 5
    assert bench.index.match(chain, 0.0) == {("d0", EPOCH): BlockHit(0, 4)}
    whole = KVSnapshot(number=7, hashes=tuple(chain), first=True, last=True)
    bench.engine.say.put_nowait(pb.SessionEvent(kv_snapshot=convert.kv_snapshot_to_proto(EPOCH, whole)))
    bench.engine.say.put_nowait(stored(9, chain[3]))
    assert (await bench.engine.told.get()).resend_kv.after_number == 7
    assert bench.engine.told.empty()
    await connection.close()


@pytest.mark.parametrize(
    "report",
    [
        stored(1, bytes(16), epoch=EPOCH + 1),
        pb.SessionEvent(load=pb.LoadSnapshot(engine_id="d0", epoch=EPOCH + 1, number=2)),
    ],
    ids=["kv events", "load"],
)
async def test_reports_of_another_epoch_end_the_session(bench: Bench, report: pb.SessionEvent) -> None:
    connection = await bench.open()
    stream = connection.submit(ask("a"))
    bench.engine.say.put_nowait(report)
    with pytest.raises(EngineDied, match="restarted"):
        await anext(stream)
    await connection.close()


class EndedCall:
    """A call that has ended, as a write meets it before the read does."""

    def __aiter__(self) -> AsyncIterator[pb.SessionEvents]:
        return self

    async def __anext__(self) -> pb.SessionEvents:
        await asyncio.Event().wait()
        raise StopAsyncIteration

    async def write(self, message: pb.SessionCommands) -> None:
        raise asyncio.InvalidStateError("RPC already finished.")


async def test_a_request_whose_submission_meets_the_sessions_end_hears_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        def __init__(self, channel: grpc.aio.Channel) -> None:
            self.Session = EndedCall

    monkeypatch.setattr("pdserve.dispatch.connection.EngineServiceStub", Stub)
    connection = bench.connect()
    async with asyncio.timeout(5):
        with pytest.raises(EngineDied):
            await anext(connection.submit(ask("a")))
    assert connection.failed
    await connection.close()


TICKET = TransferTicket(
    id="t",
    request_id="a",
    engine_id="d0",
    epoch=EPOCH,
    address="127.0.0.1:1",
    layout_hash=b"h",
    num_tokens=7,
    block_size=4,
    lease=10.0,
    ranks=(),
    growth=9,
)


async def test_a_request_that_is_asked_to_depart_answers_with_its_ticket(bench: Bench) -> None:
    connection = await bench.open()
    asked = asyncio.create_task(connection.depart("a"))
    assert (await bench.engine.told.get()).depart_request_id == "a"
    departure = Departure(ticket=TICKET, output_token_ids=(5, 6))
    bench.engine.say.put_nowait(pb.SessionEvent(departure=convert.departure_to_proto("b", departure)))
    bench.engine.say.put_nowait(pb.SessionEvent(departure=convert.departure_to_proto("a", departure)))
    assert await asked == departure
    refused = asyncio.create_task(connection.depart("a"))
    await bench.engine.told.get()
    bench.engine.say.put_nowait(pb.SessionEvent(departure=convert.departure_to_proto("a", Unavailable("it has ended"))))
    with pytest.raises(Unavailable, match="it has ended"):
        await refused
    await connection.close()


async def test_whoever_waits_for_a_departure_hears_of_the_engines_end(bench: Bench) -> None:
    connection = await bench.open()
    asked = asyncio.create_task(connection.depart("a"))
    await bench.engine.told.get()
    await connection.close()
    with pytest.raises(EngineDied):
        await asked
    with pytest.raises(EngineDied):
        await connection.depart("a")
