"""An answer ends as its request did, whatever befalls those who are told of it or who prepare it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import Counter, Histogram
from structlog.testing import capture_logs

from pdserve.core.errors import Cancelled, DeadlineExceeded, Unavailable
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.answer import Answer
from pdserve.gateway.auth import Identity
from pdserve.gateway.gateway import Ask, Gateway
from pdserve.gateway.ports import PreparePrompt
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.telemetry.record import RequestRecord
from tests.scripted_generator import HANG, ScriptedGenerator, Step
from tests.tiny_tokenizers import MODEL, byte_level


class Front:
    """A gateway whose engines play a script."""

    def __init__(
        self, folder: Path, script: Callable[[Request], list[Step]], prepare: PreparePrompt | None = None
    ) -> None:
        self.generator = ScriptedGenerator(script)
        self.gateway = Gateway(self.generator, Tokenizer.load(byte_level(folder)), MODEL, prepare=prepare)

    def begin(self, timeout: float = 60.0) -> Answer:
        ask = Ask(
            id="r",
            endpoint="completions",
            prompt_token_ids=(1, 2, 3),
            sampling=SamplingParams(max_tokens=4),
            identity=Identity(salt=b""),
            timeout=timeout,
        )
        return self.gateway.begin(ask)


def two_tokens(request: Request) -> list[Step]:
    return [
        TokenDelta(request_id=request.id, index=0, token_ids=(70,)),
        TokenDelta(request_id=request.id, index=1, token_ids=(71,), finish_reason=FinishReason.LENGTH),
    ]


async def reasons(answer: Answer) -> list[FinishReason | None]:
    return [delta.finish_reason async for delta in answer.deltas()]


async def test_a_broken_counter_or_listener_harms_no_answer_and_keeps_nobody_else_from_hearing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a defect")

    front, told = Front(tmp_path, two_tokens), list[RequestRecord]()
    front.gateway.tell_ends(broken)
    front.gateway.tell_ends(told.append)
    monkeypatch.setattr(Counter, "inc", broken)
    monkeypatch.setattr(Histogram, "observe", broken)
    answer = front.begin()
    with capture_logs() as logs:
        assert (await reasons(answer))[-1] is FinishReason.LENGTH
    assert [record.status for record in told] == ["ok"]
    assert told[0].output_tokens == 2
    assert any(log["event"] == "telemetry of a request failed" for log in logs)
    assert any(log["event"] == "request" for log in logs)
    await asyncio.wait_for(front.gateway.intake.drained(5), 5)


async def test_a_timeout_of_what_serves_it_is_not_taken_for_its_deadline(tmp_path: Path) -> None:
    front = Front(tmp_path, lambda _: [TimeoutError("a socket's")])
    answer = front.begin()
    with pytest.raises(TimeoutError, match="a socket's"):
        await reasons(answer)
    assert answer.record.status == "internal_error"


async def test_its_deadline_and_an_abort_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.gateway.answer._BACKSTOP", 0.0)
    front = Front(tmp_path, lambda _: [HANG])
    with pytest.raises(DeadlineExceeded, match=r"complete after 0\.05 s"):
        await reasons(front.begin(timeout=0.05))
    answer = front.begin()
    asyncio.get_running_loop().call_later(0.01, answer.abort, Cancelled("the request was aborted"))
    with pytest.raises(Cancelled, match="aborted"):
        await reasons(answer)


async def test_who_is_cut_off_because_the_server_ends_is_told_that_another_will_answer(tmp_path: Path) -> None:
    front = Front(tmp_path, lambda _: [HANG])
    answer = front.begin()
    running = asyncio.create_task(reasons(answer))
    while not len(front.gateway.intake):
        await asyncio.sleep(0)
    assert not await front.gateway.intake.drained(0.01)
    with pytest.raises(Unavailable, match="another one will answer"):
        await running
    assert answer.record.status == Unavailable.code


async def test_a_prompt_is_prepared_before_it_is_generated_and_within_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.gateway.answer._BACKSTOP", 0.0)
    prepared: list[str] = []

    async def prepare(request: Request) -> None:
        assert not front.generator.requests
        prepared.append(request.id)
        if len(prepared) > 1:
            await asyncio.Event().wait()

    front = Front(tmp_path, two_tokens, prepare)
    await reasons(front.begin())
    assert [request.id for request in front.generator.requests] == prepared == ["r"]
    front.generator.requests.clear()
    with pytest.raises(DeadlineExceeded):
        await reasons(front.begin(timeout=0.05))
    assert not front.generator.requests
