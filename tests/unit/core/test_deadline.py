"""One deadline over many waits: it strikes the wait under way, and only that."""

import asyncio

import pytest

from pdserve.core.deadline import Deadline

SOON, FAR = 0.02, 60.0


def after(seconds: float) -> Deadline:
    return Deadline(asyncio.get_running_loop().time() + seconds)


async def test_waits_that_end_in_time_are_left_alone() -> None:
    deadline = after(FAR)
    assert [await deadline.before(asyncio.sleep(0, n)) for n in range(3)] == [0, 1, 2]
    deadline.close()


async def test_the_wait_under_way_is_cancelled_and_ends_before_the_caller_hears() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    deadline = after(SOON)
    with pytest.raises(TimeoutError):
        await deadline.before(work())
    assert ended
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the task goes on as if it had not been cancelled"
    deadline.close()


async def test_between_waits_nothing_is_struck_but_the_next_wait_is() -> None:
    deadline = after(0.0)
    await asyncio.sleep(SOON)
    with pytest.raises(TimeoutError):
        await deadline.before(asyncio.Event().wait())
    deadline.close()


async def test_a_wait_that_need_not_wait_succeeds_after_the_deadline() -> None:
    async def at_once() -> int:
        return 1

    deadline = after(-1.0)
    assert await deadline.before(at_once()) == 1
    await asyncio.sleep(0)
    deadline.close()


async def test_it_moves_both_ways() -> None:
    deadline = after(SOON)
    deadline.move(asyncio.get_running_loop().time() + FAR)
    await deadline.before(asyncio.sleep(2 * SOON))
    asyncio.get_running_loop().call_later(SOON, deadline.move, 0.0)
    with pytest.raises(TimeoutError):
        await deadline.before(asyncio.Event().wait())
    deadline.close()


async def test_a_cancel_from_elsewhere_stays_a_cancel() -> None:
    deadline = after(FAR)
    task = asyncio.create_task(deadline.before(asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline.close()


async def test_of_two_around_one_wait_the_one_that_passed_says_so() -> None:
    outer, inner = after(SOON), after(FAR)
    with pytest.raises(TimeoutError):
        await outer.before(inner.before(asyncio.Event().wait()))
    outer.close()
    inner.close()


async def test_it_says_whether_it_struck_or_the_work_timed_out_by_itself() -> None:
    async def gives_up() -> None:
        raise TimeoutError("its own")

    deadline = after(FAR)
    with pytest.raises(TimeoutError, match="its own"):
        await deadline.before(gives_up())
    assert not deadline.struck
    deadline.move(0.0)
    with pytest.raises(TimeoutError):
        await deadline.before(asyncio.Event().wait())
    assert deadline.struck
    deadline.move(asyncio.get_running_loop().time() + FAR)
    with pytest.raises(TimeoutError, match="its own"):
        await deadline.before(gives_up())
    assert not deadline.struck
    deadline.close()


async def test_of_two_nested_only_the_one_that_passed_struck() -> None:
    outer, inner = after(FAR), after(SOON)
    with pytest.raises(TimeoutError):
        await outer.before(inner.before(asyncio.Event().wait()))
    assert (outer.struck, inner.struck) == (False, True)
    outer.close()
    inner.close()


async def test_an_error_of_the_work_is_its_own() -> None:
    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("while it was cancelled")

    deadline = after(SOON)
    with pytest.raises(ValueError, match="while"):
        await deadline.before(work())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    deadline.close()
