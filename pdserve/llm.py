"""Offline generation in this process: one unified engine, no server.

from pdserve import LLM, SamplingParams
with LLM("demo") as llm:
    print(llm.generate("What is a list?", SamplingParams(temperature=0, max_tokens=40))[0].text)
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import count
from os import getpid
from pathlib import Path
from secrets import randbits
from threading import Thread
from types import TracebackType
from typing import Self, TypeVar

from pdserve.config.schema import Config, Device
from pdserve.config.times import Times
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, EngineLimits, EngineState, Role, new_epoch
from pdserve.core.errors import InvalidRequest, from_wire
from pdserve.core.request import MAX_SEED, FinishReason, Request, SamplingParams
from pdserve.core.ticket import TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.engine.engine import Engine
from pdserve.engine.server import grpc_links
from pdserve.gateway.detokenizer import Detokenizer
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.launch.device import find_device
from pdserve.worker.service import WorkerSpec, open_worker

T = TypeVar("T")
Prompt = str | Sequence[int]

_NO_DEADLINE = 365 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The answer to one prompt. logprobs align with token_ids when asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    cached_tokens: int


class LLM:
    """A model in this process. Use as a context manager, or call close.

    model is a checkpoint directory or "demo"; num_blocks × block_size tokens of KV are kept. tensor_parallel ranks
    compute it together, each in a process of its own. Raises CheckpointError or ConfigError when the model cannot be
    served.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: str = "auto",
        dtype: str = "auto",
        block_size: int = 16,
        num_blocks: int = 512,
        tensor_parallel: int = 1,
        limits: EngineLimits | None = None,
        deterministic: bool | None = None,
    ) -> None:
        path = Config(model=str(model)).model_path
        chosen = find_device(Device(device))
        self.tokenizer = Tokenizer.load(path)
        self._limits = limits or EngineLimits()
        self._ids = count()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="pdserve-llm", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        spec = WorkerSpec(
            model=path,
            engine_id="llm",
            epoch=new_epoch(),
            device=chosen,
            dtype=dtype,
            block_size=block_size,
            num_blocks=num_blocks,
            tensor_parallel=tensor_parallel,
            deterministic=deterministic,
            backends=("loopback",),
        )
        try:
            self._engine = self._run(self._open(spec))
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer all prompts (text, or token ids) together, in their order.

        One SamplingParams serves all prompts, or give one for each. Raises InvalidRequest for a prompt
        that cannot run here; the others are then cancelled.
        """
        batch = _as_batch(prompts)
        params = _as_params(sampling, len(batch))
        requests = [self._request(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        return self._run(self._answer_all(requests))

    def close(self) -> None:
        """Free the model; running generations are cancelled."""
        if self._loop.is_closed():
            return
        self._run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[None, None, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _open(self, spec: WorkerSpec) -> Engine:
        worker = await open_worker(spec, "inproc" if spec.tensor_parallel == 1 else "process")
        self._stack.push_async_callback(worker.close)
        endpoint = Endpoint(
            engine_id=spec.engine_id,
            role=Role.UNIFIED,
            epoch=spec.epoch,
            address="",
            pid=getpid(),
            state=EngineState.READY,
        )
        times, clock = Times(), SystemClock()
        engine = Engine(
            endpoint=endpoint,
            info=worker.info,
            limits=self._limits,
            executor=worker.executor,
            transfer=worker.transfer,
            open_link=grpc_links(worker.transfer, times, clock),
            times=times,
            clock=clock,
        )
        return await self._stack.enter_async_context(engine)

    def _request(self, prompt: Prompt, sampling: SamplingParams) -> Request:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        seed = sampling.seed if sampling.seed is not None else randbits(63) & MAX_SEED
        return Request(
            id=f"llm-{next(self._ids)}",
            prompt_token_ids=tuple(token_ids),
            sampling=replace(sampling, seed=seed),
            timeout=_NO_DEADLINE,
        )

    async def _answer_all(self, requests: list[Request]) -> list[RequestOutput]:
        tasks = [asyncio.create_task(self._answer(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: Request) -> RequestOutput:
        deltas: asyncio.Queue[TokenDelta | TransferTicket] = asyncio.Queue()

        def sink(items: list[TokenDelta | TransferTicket]) -> None:
            for item in items:
                deltas.put_nowait(item)

        self._engine.start(request, sink)
        try:
            return await self._collect(request, deltas)
        finally:
            self._engine.cancel(request.id)

    async def _collect(self, request: Request, deltas: asyncio.Queue[TokenDelta | TransferTicket]) -> RequestOutput:
        detokenizer = Detokenizer(self.tokenizer.vocabulary, request.sampling, self._engine.info.eos_token_ids)
        token_ids: list[int] = []
        logprobs: list[float] = []
        text = ""
        while True:
            delta = await deltas.get()
            assert isinstance(delta, TokenDelta)
            if delta.error:
                raise from_wire(*delta.error)
            token_ids += delta.token_ids
            logprobs += delta.logprobs or ()
            shown = detokenizer.push(delta)
            text += shown.text
            if shown.finish_reason:
                return RequestOutput(
                    prompt_token_ids=request.prompt_token_ids,
                    token_ids=tuple(token_ids),
                    text=text,
                    logprobs=tuple(logprobs) if request.sampling.logprobs else None,
                    finish_reason=shown.finish_reason,
                    cached_tokens=delta.trace.cached_tokens if delta.trace else 0,
                )


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # the check above is beyond mypy's narrowing
    return list(prompts)  # type: ignore[arg-type]


def _as_params(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * num_prompts
    if len(sampling) != num_prompts:
        raise InvalidRequest(f"{len(sampling)} sampling parameters were given for {num_prompts} prompts", "sampling")
    return sampling
