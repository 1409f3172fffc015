"""The handoff service of engines, reached without sockets: real messages, real servicers, and lines that misbehave.

Messages arrive in order, as over a stream; a fault loses one, doubles one or holds the line up. A line breaks as a
whole when it is cut or when either end dies; a frozen end neither hears nor speaks.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import grpc

from pdserve.engine.server import HandoffService
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.simulator.node import Message, Node

LATENCY = 0.01
HELD_UP = 2.5
"""Seconds a held-up line is late: short of what makes a link give up."""


class Fault(StrEnum):
    LOSE = "lose"
    DOUBLE = "double"
    HOLD_UP = "hold up"


@dataclass(eq=False)
class Listener:
    """What listens at an address."""

    node: Node
    service: HandoffService


@dataclass(eq=False)
class Line:
    """One direction between two processes."""

    source: Node
    target: Node
    faults: deque[Fault | None] = field(default_factory=deque)
    _under_way: deque[Message] = field(default_factory=deque)
    _last_arrival: float = 0.0

    def send(self, message: Message) -> None:
        self.source.run(lambda: self._depart(message))

    def _depart(self, message: Message) -> None:
        fault = self.faults.popleft() if self.faults else None
        loop = asyncio.get_running_loop()
        self._last_arrival = max(self._last_arrival, loop.time() + LATENCY + (HELD_UP if fault is Fault.HOLD_UP else 0))
        for _ in range({Fault.LOSE: 0, Fault.DOUBLE: 2}.get(fault, 1) if fault else 1):
            # Timers for the same moment fire in any order, so each brings the oldest message.
            self._under_way.append(message)
            loop.call_at(self._last_arrival, lambda: self.target.run(self._under_way.popleft()))


class Network:
    """Who listens where, and every stream that is open. accuse hears of servicers that raise."""

    def __init__(self, accuse: Callable[[str], None]) -> None:
        self.listeners: dict[str, Listener] = {}
        self.callers: dict[str, Node] = {}
        self.streams: list[Stream] = []
        self.accuse = accuse

    def open_channel(self, address: str) -> "Channel":
        """address is that of the listener, behind whom it is for: "CALLER>ADDRESS"."""
        caller, _, listener = address.partition(">")
        return Channel(self, self.callers[caller], listener)


def lost(details: str = "") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


class Channel:
    def __init__(self, network: Network, caller: Node, address: str) -> None:
        self.network = network
        self.caller = caller
        self.address = address
        self._streams: list[Stream] = []

    async def connect(self, hello: pb.PeerHello, timeout: float) -> pb.PeerHello:
        listener = self.network.listeners.get(self.address)
        if listener is None or not listener.node.alive:
            await asyncio.sleep(LATENCY)
            raise lost("nobody listens")
        answer: asyncio.Future[pb.PeerHello] = asyncio.get_running_loop().create_future()
        there, back = Line(self.caller, listener.node), Line(listener.node, self.caller)

        async def serve() -> None:
            context: Any = None  # used only to refuse another layout, which no engine here has
            result = await listener.service.Connect(hello, context)

            def arrive() -> None:
                if not answer.done():
                    answer.set_result(result)

            back.send(arrive)

        def on_death() -> None:
            if not answer.done():
                answer.set_exception(lost("the peer died"))

        there.send(lambda: asyncio.ensure_future(serve()))
        listener.node.on_death(on_death)
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing) from None
        finally:
            listener.node.forget(on_death)

    def stream(self) -> "Stream":
        stream = Stream(self.network, self.caller, self.network.listeners[self.address])
        self._streams.append(stream)
        return stream

    async def close(self) -> None:
        for stream in self._streams:
            stream.cut()


class Stub:
    """The part of HandoffServiceStub that links use."""

    def __init__(self, channel: Channel) -> None:
        self.Connect = channel.connect
        self.Handoff = channel.stream


class Stream:
    """A Handoff call, as its client holds it."""

    def __init__(self, network: Network, caller: Node, listener: Listener) -> None:
        self.caller, self.listener = caller, listener
        self.there, self.back = Line(caller, listener.node), Line(listener.node, caller)
        self._network = network
        self._commands: asyncio.Queue[pb.HandoffCommand] = asyncio.Queue()
        self._events: asyncio.Queue[pb.HandoffEvent | Exception | None] = asyncio.Queue()
        self._over = False
        self._serving: asyncio.Task[None] | None = None
        network.streams.append(self)
        for node in (caller, listener.node):
            node.on_death(self.cut)
        listener.node.on_death(self._end_serving)
        self.there.send(self._begin)

    def cut(self) -> None:
        """Each end notices once it runs again; a dead one never."""
        if self._over:
            return
        self._over = True
        self._network.streams.remove(self)
        for node in (self.caller, self.listener.node):
            node.forget(self.cut)
        loop = asyncio.get_running_loop()
        loop.call_later(LATENCY, self.caller.run, lambda: self._events.put_nowait(lost("the line broke")))
        loop.call_later(LATENCY, self.listener.node.run, self._end_serving)

    async def write(self, command: pb.HandoffCommand) -> None:
        if self._over:
            raise asyncio.InvalidStateError("RPC already finished.")
        data = command.SerializeToString()
        self.there.send(lambda: self._commands.put_nowait(pb.HandoffCommand.FromString(data)))

    def __aiter__(self) -> AsyncIterator[pb.HandoffEvent]:
        return self

    async def __anext__(self) -> pb.HandoffEvent:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if event is None:
            raise StopAsyncIteration
        return event

    def _begin(self) -> None:
        if not self._over:
            self._serving = asyncio.get_running_loop().create_task(self._serve())

    def _end_serving(self) -> None:
        if self._serving:
            self._serving.cancel()

    async def _serve(self) -> None:
        context: Any = None
        try:
            async for event in self.listener.service.Handoff(self._received(), context):
                self.back.send(partial(self._receive, event.SerializeToString()))
            self.back.send(lambda: self._events.put_nowait(None))
        except Exception as error:
            self._network.accuse(f"the handoff service raised {error!r}")

    def _receive(self, data: bytes) -> None:
        self._events.put_nowait(pb.HandoffEvent.FromString(data))

    async def _received(self) -> AsyncIterator[pb.HandoffCommand]:
        while True:
            yield await self._commands.get()
