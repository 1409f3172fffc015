"""What waits for a reader becomes one delta, in order and without loss; what begins or ends an answer never waits."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import EngineDied
from pdserve.core.request import EngineTrace, FinishReason
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.pacing import LONGEST, Pacer, window
from pdserve.dispatch.request_stream import RequestStream


class Owner:
    def __init__(self) -> None:
        self.told: list[str] = []

    def cancel(self, request_id: str) -> None:
        self.told.append(f"cancel {request_id}")

    def forget(self, request_id: str) -> None:
        self.told.append(f"forget {request_id}")


class SteadyPacer(Pacer):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.window = seconds

    def sample(self, now: float) -> float:
        return self.window


def delta(index: int, *tokens: int, finish: FinishReason | None = None, logprobs: bool = False) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        index=index,
        token_ids=tokens,
        logprobs=tuple(-float(token) for token in tokens) if logprobs else None,
        finish_reason=finish,
    )


async def test_what_waits_is_read_as_one() -> None:
    stream = RequestStream(Owner(), "r")
    for index in range(3):
        stream.push(delta(index, index, logprobs=True))
    stream.push(delta(3, 3, finish=FinishReason.LENGTH, logprobs=True))
    read = await anext(stream)
    assert (read.index, read.token_ids, read.finish_reason) == (0, (0, 1, 2, 3), FinishReason.LENGTH)  # type: ignore[union-attr]
    assert read.logprobs == (0.0, -1.0, -2.0, -3.0)  # type: ignore[union-attr]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_tokens_before_an_error_are_read_before_it() -> None:
    stream = RequestStream(Owner(), "r")
    stream.push(delta(0, 7))
    stream.push(EngineDied("gone"))
    assert (await anext(stream)).token_ids == (7,)  # type: ignore[union-attr]
    with pytest.raises(EngineDied):
        await anext(stream)


@pytest.mark.parametrize(
    "then",
    [
        delta(1, finish=FinishReason.HANDOFF),
        TokenDelta(request_id="r", index=1, token_ids=(), finish_reason=FinishReason.ERROR, error=("x", "y")),
        delta(3, 3),
        delta(1, 1, logprobs=True),
    ],
    ids=["handoff", "error", "gap", "other logprobs"],
)
async def test_what_means_something_else_stays_apart(then: TokenDelta) -> None:
    stream = RequestStream(Owner(), "r")
    stream.push(delta(0, 0))
    stream.push(then)
    assert await anext(stream) == delta(0, 0)
    assert await anext(stream) == then


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.data())
def test_no_token_is_lost_or_doubled_whenever_the_reader_comes(sizes: list[int], data: st.DataObject) -> None:
    async def run() -> list[int]:
        stream = RequestStream(Owner(), "r")
        read: list[int] = []
        pushed = index = 0
        for size in sizes:
            stream.push(delta(index, *range(index, index + size)))
            index, pushed = index + size, pushed + 1
            if data.draw(st.booleans()):
                read += (await anext(stream)).token_ids  # type: ignore[union-attr]
        stream.push(delta(index, finish=FinishReason.STOP))
        async for item in stream:
            read += item.token_ids  # type: ignore[union-attr]
        return read

    assert asyncio.run(run()) == list(range(sum(sizes)))


async def test_with_a_window_a_waiting_reader_gets_the_next_tokens_together() -> None:
    stream = RequestStream(Owner(), "r", SteadyPacer(0.05))
    stream.push(delta(0, 0))
    assert (await anext(stream)).token_ids == (0,)  # type: ignore[union-attr]
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for index in (1, 2, 3):
        stream.push(delta(index, index))
        await asyncio.sleep(0)
    assert not reading.done()
    assert (await reading).token_ids == (1, 2, 3)  # type: ignore[union-attr]


async def test_the_first_and_the_last_never_wait() -> None:
    stream = RequestStream(Owner(), "r", SteadyPacer(60.0))
    for item in (delta(0, 0), delta(1, 1, finish=FinishReason.STOP)):
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.push(item)
        async with asyncio.timeout(5):
            assert await reading == item


async def test_the_end_comes_at_once_behind_tokens_that_wait() -> None:
    stream = RequestStream(Owner(), "r", SteadyPacer(60.0))
    stream.push(delta(0, 0))
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.push(delta(1, 1))
    stream.push(EngineDied("gone"))
    async with asyncio.timeout(5):
        assert (await reading).token_ids == (1,)  # type: ignore[union-attr]
        with pytest.raises(EngineDied):
            await anext(stream)


async def test_a_closed_stream_leaves_no_timer() -> None:
    owner = Owner()
    stream = RequestStream(owner, "r", SteadyPacer(0.01))
    stream.push(delta(0, 0))
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.push(delta(1, 1))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await stream.aclose()
    await asyncio.sleep(0.02)
    assert owner.told == ["forget r", "cancel r"]


async def test_it_concludes_with_the_last_delta_behind_all_that_was_not_read() -> None:
    owner = Owner()
    stream = RequestStream(owner, "r", SteadyPacer(60.0))
    stream.push(delta(0, 0))
    await anext(stream)
    concluding = asyncio.ensure_future(stream.conclude())
    await asyncio.sleep(0)
    assert owner.told == ["cancel r"], "until its last delta has come it must be known"
    trace = EngineTrace(engine_id="d", epoch=1, cached_tokens=0, stamps=())
    stream.push(delta(1, 1))
    stream.push(TokenDelta(request_id="r", index=2, token_ids=(), finish_reason=FinishReason.CANCELLED, trace=trace))
    async with asyncio.timeout(5):
        last = await concluding
    assert last is not None
    assert last.trace == trace
    assert await stream.conclude() is None
    await stream.aclose()
    assert owner.told == ["cancel r", "forget r"]


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "silent"])
async def test_it_concludes_without_an_engine_that_is_lost_or_silent(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.dispatch.request_stream._LAST_WORD", 60.0 if lost else 0.0)
    owner = Owner()
    stream = RequestStream(owner, "r")
    stream.push(delta(0, 0))
    await anext(stream)
    if lost:
        stream.push(EngineDied("gone"))
    async with asyncio.timeout(5):
        assert await stream.conclude() is None
    await stream.aclose()
    assert owner.told == ["cancel r", "forget r"]


def test_the_window_opens_with_the_load_of_the_loop() -> None:
    assert window(0.0) == window(0.3) == 0.0
    assert 0.0 < window(0.5) < window(0.7) < LONGEST
    assert window(1.0) == LONGEST
