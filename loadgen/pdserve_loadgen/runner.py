"""Runs a plan against a client: open loop by the clock, closed loop by free slots.

Prompts are written ahead in a thread, so that sending waits for nothing but its time.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from pdserve_loadgen.client import Answer, Client, Clock
from pdserve_loadgen.endpoint import Exchange
from pdserve_loadgen.prompts import PromptWriter
from pdserve_loadgen.result import Outcome, RequestResult
from pdserve_loadgen.workload import PlannedRequest

PREPARED = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    planned: PlannedRequest
    exchange: Exchange


class Preparation:
    """The requests of a plan with their prompts, at most PREPARED of them ahead of their taking."""

    def __init__(self, plan: Iterable[PlannedRequest], writer: PromptWriter) -> None:
        self._plan = plan
        self._writer = writer
        self._ready: asyncio.Queue[Prepared | None] = asyncio.Queue(PREPARED)
        self.begun = asyncio.Event()

    async def work(self) -> None:
        """Prepares until the plan ends; `begun` is set with the first."""
        for planned in self._plan:
            text = await asyncio.to_thread(self._writer.write, planned)
            await self._ready.put(Prepared(planned, Exchange((text,))))
            self.begun.set()
        await self._ready.put(None)
        self.begun.set()

    async def take(self) -> Prepared | None:
        """The next request; None, for all who ask, when there are no more."""
        prepared = await self._ready.get()
        if prepared is None:
            self._ready.put_nowait(None)
        return prepared


class Runner:
    """One run. `results` grows while it lasts; stamps are seconds since `run` began sending.

    clock: seconds, monotonic; the client must use the same one."""

    def __init__(self, client: Client, writer: PromptWriter, clock: Clock, name: str) -> None:
        self._client = client
        self._writer = writer
        self._clock = clock
        self._name = name
        self._start = clock()
        self.results: list[RequestResult] = []
        self.sent = 0
        self._asked_tokens = 0
        self._got_tokens = 0

    @property
    def in_flight(self) -> int:
        return self.sent - len(self.results)

    @property
    def answered_share(self) -> float:
        """Output tokens of the complete answers as a share of those asked for; 1 when there are none."""
        return self._got_tokens / self._asked_tokens if self._asked_tokens else 1.0

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start

    async def run(self, plan: Iterable[PlannedRequest], concurrency: int | None, duration: float | None = None) -> None:
        """Sends the plan to its end. concurrency None: open loop. duration ends a closed loop's sending.

        When cancelled, requests in flight are abandoned and not among the results."""
        preparation = Preparation(plan, self._writer)
        async with asyncio.TaskGroup() as group:
            preparing = group.create_task(preparation.work())
            await preparation.begun.wait()
            self._start = self._clock()
            if concurrency is None:
                await self._open_loop(preparation, group)
            else:
                slots = (self._closed_loop(preparation, duration or inf) for _ in range(concurrency))
                await asyncio.gather(*slots)
            preparing.cancel()

    async def _open_loop(self, preparation: Preparation, group: asyncio.TaskGroup) -> None:
        while prepared := await preparation.take():
            await asyncio.sleep(prepared.planned.at - self.elapsed)
            group.create_task(self._converse(prepared, prepared.planned.at))

    async def _closed_loop(self, preparation: Preparation, duration: float) -> None:
        while self.elapsed < duration and (prepared := await preparation.take()):
            await self._converse(prepared, self.elapsed)

    async def _converse(self, prepared: Prepared, scheduled: float) -> None:
        """All turns of one conversation; a turn is due when the one before has ended."""
        planned, exchange = prepared.planned, prepared.exchange
        for turn in range(planned.turns):
            name = f"{self._name}-{planned.index}" + (f"-{turn}" if planned.turns > 1 else "")
            self.sent += 1
            answer = await self._client.send(exchange, planned.output_tokens, name, planned.cancel_after)
            result = self._result(planned, answer, name, scheduled, turn)
            self.results.append(result)
            if result.outcome is Outcome.OK:
                self._asked_tokens += planned.output_tokens
                self._got_tokens += result.output_tokens
            if result.outcome is not Outcome.OK or turn + 1 == planned.turns:
                return
            following = await asyncio.to_thread(self._writer.write, planned, turn + 1)
            exchange = exchange.with_answer(answer.text, following)
            scheduled = self.elapsed

    def _result(self, planned: PlannedRequest, answer: Answer, name: str, scheduled: float, turn: int) -> RequestResult:
        for index, at in enumerate(answer.token_times):
            answer.token_times[index] = at - self._start
        counted = answer.completion_tokens
        return RequestResult(
            id=name,
            scheduled=scheduled,
            sent=answer.sent - self._start,
            finished=answer.finished - self._start,
            outcome=answer.outcome,
            token_times=answer.token_times,
            input_tokens=planned.input_tokens if answer.prompt_tokens is None else answer.prompt_tokens,
            output_tokens=len(answer.token_times) if counted is None else counted,
            error=answer.error,
            request_id=answer.request_id,
            warmup=planned.warmup,
            turn=turn,
        )
