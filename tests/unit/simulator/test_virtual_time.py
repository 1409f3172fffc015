"""Time that jumps: a month passes at once, in order, and waiting for nothing is told."""

import asyncio
import time

import pytest

from pdserve.simulator.virtual_time import MAX_SECONDS, START_UNIX, Deadlock, VirtualClock, run_virtual


def test_a_month_passes_in_no_time() -> None:
    async def sleep_a_month() -> float:
        clock = VirtualClock(asyncio.get_running_loop())
        await clock.sleep(30 * 86_400.0)
        assert clock.unix() == START_UNIX + clock.monotonic()
        return clock.monotonic()

    begun = time.perf_counter()
    assert run_virtual(sleep_a_month()) == 30 * 86_400.0
    assert time.perf_counter() - begun < 1.0


def test_sleepers_wake_in_the_order_of_their_times() -> None:
    async def wake() -> list[tuple[float, float]]:
        loop = asyncio.get_running_loop()
        woken: list[tuple[float, float]] = []

        async def sleeper(seconds: float) -> None:
            await asyncio.sleep(seconds)
            woken.append((seconds, loop.time()))

        await asyncio.gather(*(sleeper(seconds) for seconds in (3.0, 0.5, 2.0, 0.001, 1e4)))
        return woken

    woken = run_virtual(wake())
    assert [seconds for seconds, _ in woken] == [0.001, 0.5, 2.0, 3.0, 1e4]
    assert all(at == pytest.approx(seconds, abs=1e-9) for seconds, at in woken)


def test_timeouts_expire_in_virtual_time() -> None:
    async def wait() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(90.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(wait()) == pytest.approx(90.0)


def test_waiting_for_what_nobody_will_do_is_an_error() -> None:
    with pytest.raises(Deadlock):
        run_virtual(_wait_forever())


def test_time_does_not_run_so_far_that_timers_could_fail() -> None:
    with pytest.raises(OverflowError):
        run_virtual(asyncio.sleep(2 * MAX_SECONDS))


async def _wait_forever() -> None:
    await asyncio.Event().wait()
