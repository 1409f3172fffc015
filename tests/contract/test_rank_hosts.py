"""Ranks of one engine on several hosts: they compute what ranks of one host compute, and none outlives the engine."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import new_epoch
from pdserve.core.errors import CheckpointError, ConfigError, EngineDied, MalformedMessage
from pdserve.worker.frames import framed, read_frame, write_frame
from pdserve.worker.gang import WorkerGang
from pdserve.worker.hosting import Duty, Introduction, KillRank, RankHere, hear
from pdserve.worker.link import WorkerLink
from pdserve.worker.rank_door import HOST_DEADLINE, RankDoor
from pdserve.worker.rank_host import RankHost
from pdserve.worker.remote import RemoteWorker
from pdserve.worker.service import WorkerHandle, WorkerSpec, open_worker
from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants, is_gone
from tests.contract.worker_batches import BLOCK_SIZE, PROMPT, decode, prefill, run

OTHER_HOST = "127.0.0.2"
"""Also this machine, but not the address of the engine's own ranks."""
BLOCKS = (7, 2, 11)
VERSION = version("pdserve")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    return WorkerSpec(
        model=make_checkpoint(tmp_path_factory.mktemp("hosts"), "qwen3"),
        engine_id="d",
        epoch=new_epoch(),
        num_blocks=24,
        block_size=BLOCK_SIZE,
        backends=("shared_memory",),
        tensor_parallel=2,
    )


async def open_door(ranks: int = 2) -> tuple[RankDoor, str]:
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return await RankDoor.open(listener, hosts=2, ranks=ranks, threads=1), f"{host}:{port}"


@asynccontextmanager
async def hosting(leader: str, number: int = 1) -> AsyncIterator[tuple[RankHost, asyncio.Event]]:
    """A host that serves; the event ends it."""
    host, stop = RankHost(leader, number, OTHER_HOST), asyncio.Event()
    serving = asyncio.create_task(host.run(stop))
    try:
        yield host, stop
    finally:
        stop.set()
        async with asyncio.timeout(15):
            await serving


@asynccontextmanager
async def opened(spec: WorkerSpec) -> AsyncIterator[tuple[WorkerGang, RankHost]]:
    door, leader = await open_door()
    async with hosting(leader) as (host, _):
        gang = await WorkerGang.open(spec, Times(), door)
        try:
            yield gang, host
        finally:
            async with asyncio.timeout(15):
                await gang.close()


async def answer(worker: WorkerHandle) -> list[tuple[int, ...]]:
    return [tokens async for tokens in run(worker.executor, prefill(0, BLOCKS), decode(1, BLOCKS, len(PROMPT), None))]


async def until_idle(host: RankHost) -> None:
    async with asyncio.timeout(10):
        while host.serves:
            await asyncio.sleep(0.01)


async def test_ranks_of_two_hosts_say_what_ranks_of_one_host_say(spec: WorkerSpec) -> None:
    async with opened(spec) as (gang, host):
        assert host.serves
        spread = await answer(gang)
    await until_idle(host)
    together = await open_worker(spec, "process")
    try:
        assert spread == await answer(together)
    finally:
        await together.close()


async def test_a_rank_s_death_elsewhere_is_told_as_it_was_and_is_the_death_of_all(spec: WorkerSpec) -> None:
    async with opened(spec) as (gang, host):
        os.kill(gang.ranks[1].pid, signal.SIGKILL)
        death = str(await asyncio.wait_for(gang.death(), 10))
        assert f"{gang.ranks[1].pid} on {OTHER_HOST} was killed by SIGKILL" in death
        assert all(is_gone(rank.pid, 5) for rank in gang.ranks)
    await until_idle(host)


async def test_a_frozen_rank_elsewhere_is_killed_by_its_host(spec: WorkerSpec) -> None:
    door, leader = await open_door()
    async with hosting(leader) as (host, _):
        gang = await WorkerGang.open(spec, replace(Times(), heartbeat=0.5, fence=2.0), door)
        os.kill(gang.ranks[1].pid, signal.SIGSTOP)
        assert "answered nothing for 2 s" in str(await asyncio.wait_for(gang.death(), 10))
        assert all(is_gone(rank.pid, 5) for rank in gang.ranks)
        await gang.close()
        await until_idle(host)


async def test_a_host_that_is_lost_is_the_death_of_all(spec: WorkerSpec) -> None:
    door, leader = await open_door()
    serving = asyncio.create_task(RankHost(leader, 1, OTHER_HOST).run(asyncio.Event()))
    gang = await WorkerGang.open(spec, Times(), door)
    serving.cancel()
    await asyncio.wait_for(gang.death(), 10)
    assert all(is_gone(rank.pid, 5) for rank in gang.ranks)
    await gang.close()


async def test_what_a_rank_elsewhere_refuses_is_what_opening_raises(spec: WorkerSpec, tmp_path: Path) -> None:
    before = descendants(os.getpid())
    door, leader = await open_door()
    async with hosting(leader):
        with pytest.raises(CheckpointError):
            await asyncio.wait_for(WorkerGang.open(replace(spec, model=tmp_path), Times(), door), 60)
    assert all(is_gone(pid, 5) for pid in set(descendants(os.getpid())) - set(before))


async def test_without_its_other_host_an_engine_does_not_start(spec: WorkerSpec) -> None:
    before = descendants(os.getpid())
    door, _ = await open_door()
    with pytest.raises(EngineDied, match=r"host 1 of 2 did not come within 0\.5 s"):
        await WorkerGang.open(spec, replace(Times(), start_timeout=0.5), door)
    assert all(is_gone(pid, 5) for pid in set(descendants(os.getpid())) - set(before))


async def test_a_host_serves_one_incarnation_after_the_other(spec: WorkerSpec) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address, port = listener.getsockname()
    async with hosting(f"{address}:{port}") as (host, _):
        for made in (listener, None):
            again = made or socket.create_server((address, port))
            door = await RankDoor.open(again, hosts=2, ranks=2, threads=1)
            gang = await WorkerGang.open(spec, Times(), door)
            assert host.serves
            await gang.close()
            await until_idle(host)


async def test_a_host_does_not_follow_an_engine_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a group of pods is replaced, and the old host is still there when the new leader is."""
    first, second = socket.create_server(("127.0.0.1", 0)), socket.create_server((OTHER_HOST, 0))
    behind_the_name = [first.getsockname(), second.getsockname()]
    dial = asyncio.open_connection

    async def dial_by_name(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert (host, port) == ("leader", 8102)
        return await dial(*behind_the_name[0])

    monkeypatch.setattr("pdserve.worker.rank_host.asyncio.open_connection", dial_by_name)
    door = await RankDoor.open(first, hosts=2, ranks=2, threads=1)
    async with hosting("leader:8102") as (host, _):
        await door.meet(1, 10)
        del behind_the_name[0]
        await door.close()
        await until_idle(host)
        other = await RankDoor.open(second, hosts=2, ranks=2, threads=1)
        with pytest.raises(EngineDied, match="did not come"):
            await other.meet(1, 2)
        assert not host.serves
    await other.close()


async def test_a_host_that_is_to_stop_lets_its_engine_go_on(spec: WorkerSpec) -> None:
    door, leader = await open_door()
    host, stop = RankHost(leader, 1, OTHER_HOST), asyncio.Event()
    serving = asyncio.create_task(host.run(stop))
    gang = await WorkerGang.open(spec, Times(), door)
    stop.set()
    await answer(gang)
    assert not serving.done()
    await gang.close()
    await asyncio.wait_for(serving, 10)


async def test_a_host_without_an_engine_stops_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        async with hosting(f"{host}:{port}"):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (Introduction(1, OTHER_HOST, "0.0.1"), "it has pdserve 0.0.1 and the engine"),
        (Introduction(0, OTHER_HOST, VERSION), "its number is 0, and of 2 hosts those that dial are 1 to 1"),
        (Introduction(2, OTHER_HOST, VERSION), "its number is 2"),
    ],
)
async def test_a_host_that_does_not_belong_is_told_why(word: Introduction, why: str) -> None:
    door, leader = await open_door()
    async with dialled(leader) as (reader, writer):
        write_frame(writer, word)
        assert why in (await hear(reader, Duty)).refusal
        assert await read_frame(reader) is None
    await door.close()


async def test_a_host_that_is_there_already_is_not_taken_on_again() -> None:
    async with taken_on() as (_, leader, _, _), dialled(leader) as (second, secondly):
        write_frame(secondly, Introduction(1, OTHER_HOST, VERSION))
        assert "has, or has had, a host 1" in (await hear(second, Duty)).refusal


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", framed(RankHere(1, 5)), framed(RankHere(7, 5)), b""])
async def test_whoever_says_what_does_not_belong_is_hung_up_on(said: bytes) -> None:
    door, leader = await open_door()
    async with dialled(leader) as (reader, writer):
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(5):
            assert await read_frame(reader) is None
    await door.close()


async def test_a_host_that_talks_nonsense_is_hung_up_on() -> None:
    async with taken_on() as (_, _, reader, writer):
        write_frame(writer, Duty(refusal="this is no word of a host"))
        async with asyncio.timeout(5):
            assert await read_frame(reader) is None


async def test_a_rank_whose_host_answers_nothing_is_given_up_before_the_kernel_gives_the_host_up() -> None:
    async with taken_on() as (door, leader, _, _), dialled(leader) as (_, rank):
        write_frame(rank, RankHere(1, 77))
        link = await door.meet(1, 5)
        link.kill()
        death = await asyncio.wait_for(link.ended(), HOST_DEADLINE + 1)
        assert str(death) == f"the worker process 77 on {OTHER_HOST} is lost: its host answers nothing"


async def test_an_engine_that_wants_a_foreign_rank_killed_is_left_with_its_ranks() -> None:
    ended = asyncio.Event()

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(await hear(reader, Introduction | RankHere), Introduction):  # type: ignore[arg-type]
            write_frame(writer, Duty(ranks=(1,)))
            write_frame(writer, KillRank(7))
            while await read_frame(reader) is not None:
                pass
            ended.set()
        writer.close()

    async with await asyncio.start_server(lead, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(MalformedMessage, match="a rank killed that is not here"):
            await asyncio.wait_for(RankHost(f"{host}:{port}", 1, OTHER_HOST).serve(), 15)
        await asyncio.wait_for(ended.wait(), 5)


@asynccontextmanager
async def taken_on() -> AsyncIterator[tuple[RankDoor, str, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A door, its address, and the line of a host that was taken on there and has said nothing since."""
    door, leader = await open_door()
    try:
        async with dialled(leader) as (reader, writer):
            write_frame(writer, Introduction(1, OTHER_HOST, VERSION))
            assert (await hear(reader, Duty)).ranks == (1,)
            yield door, leader, reader, writer
    finally:
        await door.close()


@asynccontextmanager
async def dialled(leader: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = leader.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"revision": "r2"}, "rank 1 has loaded another model, or revision of it, than rank 0"),
        ({"numerics": "b"}, "rank 1 rounds as b and rank 0 as a; use hosts of one kind"),
    ],
)
async def test_hosts_that_would_compute_something_else_make_no_engine(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch, other: dict[str, str], why: str
) -> None:
    begin = RemoteWorker.begin

    async def begin_elsewhere(link: WorkerLink, spec: WorkerSpec, times: Times) -> RemoteWorker:
        worker = await begin(link, spec, times)
        assert spec.place
        info = replace(worker.info, numerics="a")
        if spec.place.rank:
            info = replace(info, **other)  # type: ignore[arg-type]  # whose fields are strings
        return replace(worker, started=msgspec.structs.replace(worker.started, info=info))

    monkeypatch.setattr(RemoteWorker, "begin", begin_elsewhere)
    door, leader = await open_door()
    async with hosting(leader) as (host, _):
        with pytest.raises(ConfigError, match=why):
            await WorkerGang.open(spec, Times(), door)
        await until_idle(host)
