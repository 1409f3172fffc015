"""Simulated pulls: how long they take, and how they fail."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from pdserve.core.errors import LayoutMismatch, StaleEpoch, TransferFailed, TransferTimeout
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import PeerAddress, PullSpec
from pdserve.simulator.node import Node
from pdserve.simulator.profile import PRESETS, Links
from pdserve.simulator.transfer import Port, SimTransfer
from pdserve.simulator.virtual_time import VirtualClock, run_virtual

LAYOUT = KVLayout(group=PRESETS["demo-cpu"].kv.group(), block_size=16, num_blocks=8)
LINKS = Links(latency=0.5, bandwidth=LAYOUT.block_bytes, verify=1e30)
"""One block per second."""


@dataclass
class Pair:
    """A source and a target on one fabric, connected."""

    source: Node
    target: SimTransfer
    other: SimTransfer
    clock: VirtualClock

    def spec(self, *blocks: int, deadline: float = 10.0, epoch: int = 1) -> PullSpec:
        return PullSpec(
            peer="p",
            epoch=epoch,
            source_blocks=blocks,
            target_blocks=blocks,
            digest=b"",
            seed=0,
            deadline=deadline,
            start_within=deadline,
        )


def with_pair(story: Callable[[Pair], Awaitable[None]]) -> None:
    async def run() -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        nodes = {name: Node(clock) for name in ("p", "d", "e")}
        fabric = {(name, 1): Port(node) for name, node in nodes.items()}
        target, other = (SimTransfer(LAYOUT, address(name), LINKS, fabric, nodes[name].clock) for name in ("d", "e"))
        for service in (target, other):
            await service.connect(address("p"))
        await story(Pair(nodes["p"], target, other, clock))

    run_virtual(run())


def address(name: str, layout_hash: bytes = LAYOUT.wire_hash) -> PeerAddress:
    return PeerAddress(engine_id=name, epoch=1, layout_hash=layout_hash, ranks=())


def test_pulls_take_latency_and_their_turn_on_the_source_s_port() -> None:
    async def story(pair: Pair) -> None:
        begun = pair.clock.monotonic()
        first, second = pair.target.pull(pair.spec(0, 1)), pair.other.pull(pair.spec(2))
        receipt = await first.wait()
        assert pair.clock.monotonic() - begun == pytest.approx(2.5)
        assert receipt.num_bytes == 2 * LAYOUT.block_bytes
        await second.wait()
        assert pair.clock.monotonic() - begun == pytest.approx(3.5)

    with_pair(story)


def test_a_pull_from_a_frozen_source_times_out_and_settles_with_the_thaw() -> None:
    async def story(pair: Pair) -> None:
        pair.source.freeze()
        pull = pair.target.pull(pair.spec(0, deadline=4.0))
        with pytest.raises(TransferTimeout):
            await pull.wait()
        settled = asyncio.ensure_future(pull.settled())
        await asyncio.sleep(100)
        assert not settled.done()
        pair.source.thaw()
        await settled

    with_pair(story)


def test_a_pull_from_a_source_that_dies_fails_and_is_settled() -> None:
    async def story(pair: Pair) -> None:
        pull = pair.target.pull(pair.spec(0))
        pair.source.die()
        with pytest.raises(TransferFailed):
            await pull.wait()
        await pull.settled()

    with_pair(story)


def test_a_cancelled_pull_answers_at_once_and_settles_when_its_bytes_have_landed() -> None:
    async def story(pair: Pair) -> None:
        begun = pair.clock.monotonic()
        pull = pair.target.pull(pair.spec(0, 1))
        pull.cancel()
        with pytest.raises(TransferFailed):
            await pull.wait()
        assert pair.clock.monotonic() == begun
        await pull.settled()
        assert pair.clock.monotonic() - begun == pytest.approx(2.5)

    with_pair(story)


def test_nobody_is_told_of_the_end_of_a_pull_that_was_given_up() -> None:
    complaints: list[object] = []

    async def story(pair: Pair) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        pull = pair.target.pull(pair.spec(0, deadline=0.1))
        with pytest.raises(TransferTimeout):
            await pull.wait()
        pair.source.die()
        await pull.settled()
        del pull
        gc.collect()

    with_pair(story)
    assert not complaints


def test_another_incarnation_or_layout_is_refused() -> None:
    async def story(pair: Pair) -> None:
        with pytest.raises(StaleEpoch):
            await pair.target.pull(pair.spec(0, epoch=2)).wait()
        with pytest.raises(LayoutMismatch):
            await pair.target.connect(address("p", b"another"))

    with_pair(story)
