"""A link that breaks says so, whichever of its tasks meets the end first."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from pdserve.config.times import Times
from pdserve.core.errors import LinkLost, PdserveError
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import PeerAddress, Pull, PullSpec
from pdserve.core.shards import KVPart
from pdserve.engine.handoff_link import HandoffLink
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from tests.clocks import ManualClock, settle

LAYOUT = KVLayout(group=KVGroup(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32"), block_size=4, num_blocks=8)


class ConnectOnly:
    """A TransferService that any peer suits."""

    layout = LAYOUT
    address = PeerAddress(engine_id="d0", epoch=3, layout_hash=LAYOUT.wire_hash, ranks=())

    async def connect(self, peer: PeerAddress) -> str:
        return "any"

    def disconnect(self, engine_id: str) -> Awaitable[None]:
        raise AssertionError("not used here")

    def digest(
        self, blocks: tuple[int, ...], num_tokens: int, seed: int, part: KVPart | None = None
    ) -> Awaitable[bytes]:
        raise AssertionError("not used here")

    def pull(self, spec: PullSpec) -> Pull:
        raise AssertionError("not used here")


class EndedCall:
    """A call that has ended, as a write meets it before the read does."""

    def __aiter__(self) -> AsyncIterator[pb.HandoffEvent]:
        return self

    async def __anext__(self) -> pb.HandoffEvent:
        await asyncio.Event().wait()
        raise StopAsyncIteration

    async def write(self, command: pb.HandoffCommand) -> None:
        raise asyncio.InvalidStateError("RPC already finished.")


class EndedStub:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.Handoff = EndedCall

    async def Connect(self, hello: pb.PeerHello, timeout: float) -> pb.PeerHello:
        return pb.PeerHello(engine_id="p0", epoch=7, layout_hash=hello.layout_hash, kv_kind=hello.kv_kind)


class SilentCall(EndedCall):
    """A call in which nothing happens."""

    async def write(self, command: pb.HandoffCommand) -> None:
        await asyncio.Event().wait()


class SilentStub(EndedStub):
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.Handoff = SilentCall


class SlowChannel:
    """A channel that takes its time to close."""

    def __init__(self) -> None:
        self.may_close = asyncio.Event()

    async def close(self) -> None:
        await self.may_close.wait()


def open_link(on_failure: Callable[[PdserveError], None]) -> HandoffLink:
    return HandoffLink(
        engine_id="p0",
        epoch=7,
        address="127.0.0.1:1",
        transfer=ConnectOnly(),
        times=Times(),
        clock=ManualClock(),
        on_failure=on_failure,
    )


async def test_whoever_is_cancelled_while_he_closes_a_link_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = SlowChannel()
    monkeypatch.setattr("pdserve.engine.handoff_link.HandoffServiceStub", SilentStub)
    monkeypatch.setattr("pdserve.engine.handoff_link.open_channel", lambda address: channel)
    failures: list[PdserveError] = []
    link = open_link(failures.append)
    link.start()
    await link.ready()
    closing = asyncio.create_task(link.close())
    await settle()
    closing.cancel()
    await settle()
    assert closing.cancelled()
    assert [type(failure) for failure in failures] == [LinkLost], "whoever waits for the link hears of its end even so"
    channel.may_close.set()
    await settle()


async def test_a_command_that_meets_the_streams_end_fails_the_link_and_whoever_waits_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdserve.engine.handoff_link.HandoffServiceStub", EndedStub)
    failed: asyncio.Queue[PdserveError] = asyncio.Queue()
    link = open_link(failed.put_nowait)
    link.start()
    await link.ready()
    link.attach("t", 0, lambda news: None)
    async with asyncio.timeout(5):
        error = await failed.get()
    assert isinstance(error, LinkLost)
    with pytest.raises(LinkLost):
        await link.release("t")
    await link.close()
