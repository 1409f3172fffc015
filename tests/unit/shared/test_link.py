"""The line to Redis, where something goes wrong that nobody has foreseen."""

import asyncio

import pytest
from structlog.testing import capture_logs

from pdserve.core.tasks import running
from pdserve.shared.link import RedisLink
from tests.clocks import ManualClock, settle


async def test_a_defect_is_told_and_the_line_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tries = ManualClock(), 0
    link = RedisLink("redis://127.0.0.1:1", "pdserve", clock, heartbeat=1.0, answer=1.0)

    async def keep() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise KeyError("a defect")
        await asyncio.Event().wait()

    monkeypatch.setattr(link, "_keep", keep)
    with capture_logs() as logs:
        async with running(link.run()):
            await settle()
            assert not link.up
            await clock.advance(1.0)
            assert tries == 2
    told = [log for log in logs if log.get("exc_info")]
    assert [log["log_level"] for log in told] == ["error"]
    await link.close()
