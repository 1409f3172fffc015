"""pdserve's engine as it serves: scheduler, block bookkeeping, executor thread, sampler."""

import asyncio
from collections.abc import Coroutine, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

from benchmarks.cpu.contender import Prompt
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import Request, SamplingParams
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import Emitted
from pdserve.worker.worker import WorkerOptions, build_worker

MAX_TOKENS = 2048

T = TypeVar("T")


class Pdserve:
    """An engine core pumped by hand, one step at a time, over a worker in this process."""

    name = "pdserve"
    how = "engine core and executor thread in this process, deterministic mode"

    def __init__(self, checkpoint: Path, dtype: str, *, num_blocks: int) -> None:
        options = WorkerOptions(num_blocks=num_blocks, dtype=dtype)
        self._worker = build_worker(checkpoint, options)
        self._loop = asyncio.new_event_loop()
        self._ids = count()
        self._core = self._new_core()
        self._live: list[int] = []

    def _new_core(self) -> EngineCore:
        tickets = count()
        limits = EngineLimits(max_tokens_per_step=512, chunk_size=512, max_rows=64, max_model_len=4096, depth=1)
        return EngineCore(
            info=self._worker.info,
            limits=limits,
            layout=self._worker.layout,
            clock=SystemClock(),
            new_ticket_id=lambda: str(next(tickets)),
        )

    def prefill(self, prompt: Prompt) -> int:
        sequence = self._add(prompt)
        tokens: list[int] = []
        while not tokens:
            tokens = self.step()
        self._core.abort(sequence)
        return tokens[0]

    def begin(self, prompts: Sequence[Prompt]) -> None:
        for sequence in self._live:
            self._core.abort(sequence)
        self._live = [self._add(prompt) for prompt in prompts]
        while len(self.step()) < len(prompts):
            pass

    def step(self) -> list[int]:
        return self.run(self.advance())

    def run(self, work: Coroutine[None, None, T]) -> T:
        """Until work is done, on the engine's event loop."""
        return self._loop.run_until_complete(work)

    async def advance(self) -> list[int]:
        """One step, on the event loop; its tokens."""
        batch = self._core.schedule()
        assert batch is not None
        handle = self._worker.executor.forward(batch)
        self._worker.executor.sample(handle)
        output = await self._worker.executor.collect(handle)
        events = self._core.complete(output)
        return [token for event in events if isinstance(event, Emitted) for token in event.token_ids]

    def close(self) -> None:
        self._worker.close()
        self._loop.close()

    def _add(self, prompt: Prompt) -> int:
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        return self._core.add(Request(id=str(next(self._ids)), prompt_token_ids=prompt, sampling=sampling))
