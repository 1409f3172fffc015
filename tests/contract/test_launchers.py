"""What every launcher promises the supervisor."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pdserve.cluster import ray_launcher
from pdserve.cluster.launcher import Launched, Launcher, LaunchSpec, Resources
from pdserve.core.errors import CheckpointError, EngineDied
from tests.contract.processes import count_fds, count_files, descendants, environment_of, is_gone, parent_of

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one Ray session for all: it takes seconds to start


def spec(behaviour: str, **payload: object) -> LaunchSpec:
    return LaunchSpec(
        name="child-0",
        module="tests.contract.launched_program",
        payload={"behaviour": behaviour, **payload},
        threads=3,
        resources=Resources(cpus=0.5),
    )


@asynccontextmanager
async def launched(launcher: Launcher, what: LaunchSpec) -> AsyncIterator[Launched]:
    """A child that is gone when the block is left, whatever the test did."""
    child = await launcher.launch(what)
    try:
        async with asyncio.timeout(20):
            yield child
    finally:
        child.kill()
        await child.ended()


async def test_a_child_gets_its_payload_and_reports_ready(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve", address="127.0.0.1:5", name="naïve")) as child:
        assert await child.ready() == {"address": "127.0.0.1:5", "name": "naïve"}
        assert not is_gone(child.pid, within=0)


async def test_ready_may_be_asked_again(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve", address="a")) as child:
        assert await child.ready() == await child.ready()


async def test_output_of_a_child_is_no_answer_and_reaches_our_stderr_under_its_name(
    launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    async with launched(launcher, spec("noisy")) as child:
        assert await child.ready() == {"threads": "3"}
        child.terminate()
        await child.ended()
    captured = capfd.readouterr()
    assert "[child-0] {'not': 'the answer'}\n" in captured.err
    assert captured.out == ""


async def test_a_refusal_arrives_as_the_childs_own_error(launcher: Launcher) -> None:
    async with launched(launcher, spec("refuse")) as child:
        with pytest.raises(CheckpointError, match=r"no config\.json in /nowhere"):
            await child.ready()
        assert await child.ended() == 78


async def test_a_death_before_ready_tells_the_exit_code_and_the_last_words(launcher: Launcher) -> None:
    async with launched(launcher, spec("crash")) as child:
        with pytest.raises(EngineDied, match=r"child-0 exited with code 3 before(.|\n)*something is wrong"):
            await child.ready()


async def test_a_child_that_fails_after_it_was_ready_says_why_in_one_line(
    launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    async with launched(launcher, spec("lose")) as child:
        await child.ready()
        assert await child.ended() == 1
    said = "".join(capfd.readouterr())
    assert "its worker was killed" in said
    assert "Traceback" not in said


async def test_a_child_that_never_answers_keeps_ready_waiting_until_it_is_killed(launcher: Launcher) -> None:
    async with launched(launcher, spec("silent")) as child:
        waiting = asyncio.ensure_future(child.ready())
        done, _ = await asyncio.wait([waiting], timeout=1.0)
        assert not done
        child.kill()
        with pytest.raises(EngineDied, match="killed by SIGKILL"):
            await waiting


async def test_an_answer_nobody_understands_is_an_error(launcher: Launcher) -> None:
    async with launched(launcher, spec("nonsense")) as child:
        with pytest.raises(EngineDied, match="child-0 answered something else than"):
            await child.ready()


async def test_terminate_lets_a_child_drain_and_end_with_code_zero(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve")) as child:
        await child.ready()
        child.terminate()
        assert await child.ended() == 0
        child.terminate()
        child.kill()


async def test_kill_ends_a_child_that_ignores_terminate(launcher: Launcher) -> None:
    async with launched(launcher, spec("stubborn")) as child:
        await child.ready()
        child.terminate()
        ending = asyncio.ensure_future(child.ended())
        done, _ = await asyncio.wait([ending], timeout=0.5)
        assert not done
        child.kill()
        assert await ending == -signal.SIGKILL


async def test_kill_takes_the_childs_own_workers_along(launcher: Launcher) -> None:
    async with launched(launcher, spec("parental")) as child:
        grandchild = (await child.ready())["grandchild"]
        assert not is_gone(grandchild, within=0)
        child.kill()
        await child.ended()
        assert is_gone(grandchild, within=5)


async def test_a_frozen_child_can_be_killed(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve")) as child:
        await child.ready()
        os.kill(child.pid, signal.SIGSTOP)
        child.kill()
        assert await child.ended() == -signal.SIGKILL


@pytest.mark.parametrize("launcher", ["ray"], indirect=True)
async def test_a_child_dies_with_its_ray_actor(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve")) as child:
        await child.ready()
        os.kill(parent_of(child.pid), signal.SIGKILL)
        assert await child.ended() == -signal.SIGKILL
        assert is_gone(child.pid, within=5)


@pytest.mark.parametrize("launcher", ["ray"], indirect=True)
async def test_a_child_of_a_frozen_ray_actor_can_be_killed(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve")) as child:
        await child.ready()
        os.kill(parent_of(child.pid), signal.SIGSTOP)
        child.kill()
        assert await child.ended() == -signal.SIGKILL
        assert is_gone(child.pid, within=5)


@pytest.mark.parametrize("launcher", ["ray"], indirect=True)
async def test_a_launch_that_waits_for_room_can_be_called_off(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_launcher, "PATIENCE", 0.2)
    greedy = replace(spec("serve"), resources=Resources(cpus=1000))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await launcher.launch(greedy)
    assert "waiting for room in the Ray cluster" in "".join(capfd.readouterr())
    async with launched(launcher, spec("serve")) as child:
        await child.ready()


async def test_nothing_is_left_open_after_a_child_has_ended(launcher: Launcher) -> None:
    async with launched(launcher, spec("serve")) as child:
        await child.ready()  # whatever the first launch opens for good is open now
    before = count_fds()
    for behaviour in ("serve", "refuse", "crash"):
        async with launched(launcher, spec(behaviour)) as child:
            await asyncio.wait([asyncio.ensure_future(_outcome(child))])
    async with asyncio.timeout(10):  # Ray closes its line to an actor a moment after the actor has gone
        while count_fds() > before:
            await asyncio.sleep(0.1)


async def _outcome(child: Launched) -> None:
    try:
        await child.ready()
    except (CheckpointError, EngineDied):
        await child.ended()


@pytest.mark.parametrize("kind", ["process", "ray"])
async def test_everything_a_killed_parent_has_started_dies_with_it(kind: str) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contract.launching_program", kind), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        child = int(await parent.stdout.readline())
        started = descendants(parent.pid)
        assert child in started
        token = environment_of(child)["RAY_AUTH_TOKEN_PATH"] if kind == "ray" else ""
    finally:
        parent.kill()
        await parent.wait()
    assert [pid for pid in started if not is_gone(pid, within=5)] == []
    assert not token or count_files(token.removesuffix("/token")) == 0
