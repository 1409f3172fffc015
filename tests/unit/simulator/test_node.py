"""Simulated processes and wires: in order, late by the latency, held by a freeze, silenced by death."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from pdserve.simulator.node import Node, Wire
from pdserve.simulator.virtual_time import VirtualClock, run_virtual

LATENCY = 0.25


class Mailbox:
    """What arrived, and when."""

    def __init__(self) -> None:
        self.mail: list[tuple[float, int]] = []

    def take(self, number: int) -> None:
        self.mail.append((asyncio.get_running_loop().time(), number))

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.mail]


def story(tell: Callable[[Node, Node, Wire, Mailbox], Awaitable[None]]) -> None:
    async def run() -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        source, target = Node(clock), Node(clock)
        await tell(source, target, Wire(source, target, LATENCY), Mailbox())

    run_virtual(run())


def send(wire: Wire, box: Mailbox, *numbers: int) -> None:
    for number in numbers:
        wire.send(partial(box.take, number))


def test_messages_arrive_in_order_one_latency_later() -> None:
    async def tell(source: Node, target: Node, wire: Wire, box: Mailbox) -> None:
        send(wire, box, *range(50))
        await asyncio.sleep(1)
        assert box.numbers == list(range(50))
        assert [at for at, _ in box.mail] == pytest.approx([LATENCY] * 50)

    story(tell)


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_freeze_at_either_end_holds_messages_in_order_until_the_thaw(who: str) -> None:
    async def tell(source: Node, target: Node, wire: Wire, box: Mailbox) -> None:
        frozen = {"source": source, "target": target}[who]
        frozen.freeze()
        send(wire, box, 1, 2, 3)
        await asyncio.sleep(5)
        assert box.numbers == []
        frozen.thaw()
        await asyncio.sleep(1)
        assert box.numbers == [1, 2, 3]

    story(tell)


def test_what_was_sent_before_a_death_arrives_and_nothing_else() -> None:
    async def tell(source: Node, target: Node, wire: Wire, box: Mailbox) -> None:
        send(wire, box, 1)
        source.die()
        send(wire, box, 2)
        await asyncio.sleep(1)
        assert box.numbers == [1]
        target.die()
        send(Wire(None, target, LATENCY), box, 3)
        await asyncio.sleep(1)
        assert box.numbers == [1]

    story(tell)


def test_a_frozen_clock_oversleeps_and_a_dead_node_is_mourned_once() -> None:
    async def tell(source: Node, target: Node, wire: Wire, box: Mailbox) -> None:
        deaths: list[int] = []
        source.on_death(lambda: deaths.append(1))
        sleeping = asyncio.ensure_future(source.clock.sleep(1.0))
        source.freeze()
        await asyncio.sleep(10)
        assert not sleeping.done()
        source.die()
        source.die()
        await sleeping
        assert deaths == [1]
        source.on_death(lambda: deaths.append(2))
        assert deaths == [1, 2]

    story(tell)
