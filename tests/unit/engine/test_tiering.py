"""The engine's end of the tiers: whatever a tier does, blocks come back exactly once, and not before it has ended."""

import asyncio
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import EngineDied
from pdserve.core.tiers import RestoreReceipt, SavedBlock, Tier, TierNews, TierRead
from pdserve.engine.core_events import RestoreReady, SaveReady
from pdserve.engine.step_timing import StepTimer
from pdserve.engine.tiering import Tiering
from tests.unit.engine.toy import FakeClock

A = b"a" * 16
NEWS = TierNews(changes=((A, Tier.HOST),), tallies=())
SAVE = SaveReady(blocks=((A, 3),), used=())
RESTORE = RestoreReady(sequence_id=1, admission=1, hashes=(A,), blocks=(5,))


class Service:
    """A tier service that answers when it is let, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = asyncio.Event()
        self.error = error
        self.deleted: list[BlockHash] = []

    async def contents(self) -> TierNews:
        return NEWS

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        await self._wait()
        self.deleted += wrong
        return NEWS

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        await self._wait()
        read = TierRead(tier=Tier.HOST, blocks=1, seconds=0.001)
        return RestoreReceipt(num_blocks=1, reads=(read,), news=NEWS)

    async def _wait(self) -> None:
        await self.go.wait()
        if self.error:
            raise self.error


class Engine:
    """What the tiering tells its engine, in order."""

    def __init__(self, service: Service, deadline: float = 60.0) -> None:
        self.told: list[tuple[str, object]] = []
        self.changed = asyncio.Event()
        self.tiering = Tiering(
            service,
            StepTimer(FakeClock()),
            block_size=16,
            restore_deadline=deadline,
            on_news=lambda news: self._tell("news", news),
            on_saved=lambda blocks: self._tell("saved", _tuple(blocks)),
            on_restored=lambda event, count: self._tell("restored", count),
            on_late=lambda event: self._tell("late", event),
        )

    def _tell(self, what: str, value: object) -> None:
        self.told.append((what, value))
        self.changed.set()

    async def until(self, what: str) -> object:
        async with asyncio.timeout(10):
            while what not in dict(self.told):
                self.changed.clear()
                await self.changed.wait()
        return dict(self.told)[what]


def _tuple(blocks: Sequence[int]) -> tuple[int, ...]:
    return tuple(blocks)


async def test_what_a_tier_holds_from_before_is_known_at_once() -> None:
    engine = Engine(Service())
    await engine.tiering.open()
    assert engine.told == [("news", NEWS)]


async def test_blocks_are_given_back_when_the_copy_has_ended_also_badly() -> None:
    for error in (None, EngineDied("gone"), OSError("broken")):
        service = Service(error)
        engine = Engine(service)
        engine.tiering.save(SAVE)
        await asyncio.sleep(0)
        assert engine.told == []
        service.go.set()
        assert await engine.until("saved") == (3,)
        await engine.tiering.close()


async def test_a_restore_that_fails_brings_nothing() -> None:
    service = Service(EngineDied("gone"))
    engine = Engine(service)
    engine.tiering.restore(RESTORE)
    service.go.set()
    assert await engine.until("restored") == 0
    assert [what for what, _ in engine.told] == ["restored"]


async def test_a_late_restore_is_told_and_ends_later_and_no_other_is_chosen_meanwhile() -> None:
    service = Service()
    engine = Engine(service, deadline=0.001)
    assert engine.tiering.choose([Tier.HOST]) == 1
    engine.tiering.restore(RESTORE)
    assert await engine.until("late") == RESTORE
    assert engine.tiering.choose([Tier.HOST]) == 0
    assert [what for what, _ in engine.told] == ["late"]
    service.go.set()
    await engine.until("restored")
    assert [what for what, _ in engine.told] == ["late", "news", "restored"]
    assert engine.tiering.choose([Tier.HOST]) == 1


async def test_closing_ends_what_waits() -> None:
    engine = Engine(Service())
    engine.tiering.save(SAVE)
    engine.tiering.restore(RESTORE)
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await engine.tiering.close()


async def test_closing_lets_the_tiers_delete_what_was_computed_wrong() -> None:
    service = Service()
    engine = Engine(service)
    engine.tiering.save(SAVE)
    engine.tiering.save(SaveReady(blocks=(), used=(), wrong=(A,)))
    closing = asyncio.create_task(engine.tiering.close())
    await asyncio.sleep(0)
    assert not service.deleted
    assert not closing.done()
    service.go.set()
    async with asyncio.timeout(5):
        await closing
    assert service.deleted == [A]


async def test_closing_says_so_where_the_tiers_do_not_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.engine.tiering._DELETE_PATIENCE", 0.01)
    engine = Engine(Service())
    engine.tiering.save(SaveReady(blocks=(), used=(), wrong=(A,)))
    with capture_logs() as logs:
        async with asyncio.timeout(5):
            await engine.tiering.close()
    assert [entry["log_level"] for entry in logs] == ["error"]
