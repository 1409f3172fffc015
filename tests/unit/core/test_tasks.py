"""Background work: it ends with its block, and nobody fails in silence."""

import asyncio

import pytest

from pdserve.core.tasks import running


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("no such thing")


async def test_work_ends_with_its_block() -> None:
    ended = []

    async def work() -> None:
        try:
            await wait_for_ever()
        finally:
            ended.append(True)

    async with running(work(), work()):
        await asyncio.sleep(0)
    assert ended == [True, True]


async def test_work_that_fails_is_logged_at_once_and_raised_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    logged = 0

    async def block() -> None:
        nonlocal logged
        async with running(fail(), wait_for_ever()):
            await asyncio.sleep(0.01)
            logged = len(caplog.records)

    with pytest.raises(ValueError, match="no such thing"):
        await block()
    assert logged == 1
    assert caplog.records[0].levelname == "CRITICAL"
    assert "fail" in caplog.records[0].getMessage()


async def test_an_error_of_the_block_comes_before_one_of_its_work() -> None:
    async def block() -> None:
        async with running(fail()):
            await asyncio.sleep(0.01)
            raise KeyError

    with pytest.raises(KeyError):
        await block()
