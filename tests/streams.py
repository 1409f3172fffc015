"""Streaming clients that note what they got and when, to judge a deployment under faults."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Barrier
from typing import Any

import httpx

from pdserve import LLM, RequestOutput, SamplingParams
from tests.deployment import Deployment


@dataclass(frozen=True)
class Ask:
    """One request, by token ids, with everything that decides its answer."""

    prompt: tuple[int, ...]
    sampling: SamplingParams

    def body(self) -> dict[str, Any]:
        s = self.sampling
        return {
            "prompt": list(self.prompt),
            "temperature": s.temperature,
            "seed": s.seed,
            "max_tokens": s.max_tokens,
            "top_p": s.top_p,
            "repetition_penalty": s.repetition_penalty,
            "ignore_eos": s.ignore_eos,
            "logprobs": 0,
            "stream": True,
        }


@dataclass
class Stream:
    """What a client saw: text, log probabilities, when each chunk came and the stream ended (monotonic)."""

    started: float
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    ended: float = 0.0

    @property
    def longest_pause(self) -> float:
        """Seconds, from the request on."""
        times = [self.started, *self.arrivals]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    def wrong(self, wanted: RequestOutput) -> str:
        """How the answer differs from the wanted one; empty if it does not."""
        if self.error:
            return f"ended with {self.error}"
        if self.finish_reasons != [wanted.finish_reason.value]:
            return f"ended {self.finish_reasons} instead of once with {wanted.finish_reason.value}"
        if self.text != wanted.text or tuple(self.logprobs) != wanted.logprobs:
            return f"said {self.text!r} instead of {wanted.text!r}"
        return ""


def ask(
    deployment: Deployment,
    request: Ask,
    *,
    request_id: str = "",
    api_key: str = "",
    timeout: float = 90.0,
    on_begin: Callable[[], object] = lambda: None,
) -> Stream:
    """Stream one answer to its end; on_begin is called with its first chunk."""
    stream = Stream(time.monotonic())
    headers = {"x-request-id": request_id} if request_id else {}
    headers |= {"authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"{deployment.url}/v1/completions"
    # verify: reading certificates takes each client 20 ms of CPU, which would count as a pause of the server.
    with httpx.stream("POST", url, json=request.body(), headers=headers, timeout=timeout, verify=False) as response:
        if response.status_code != 200:
            response.read()
            stream.error = response.json()["error"]
        else:
            for line in _lines(response):
                if line.startswith("data: {"):
                    if not stream.arrivals:
                        on_begin()
                    stream.arrivals.append(time.monotonic())
                    _take(stream, json.loads(line.removeprefix("data: ")))
    stream.ended = time.monotonic()
    return stream


def ask_all(deployment: Deployment, requests: list[Ask], pool: ThreadPoolExecutor) -> list["Future[Stream]"]:
    return [pool.submit(ask, deployment, request) for request in requests]


def begin_all(
    deployment: Deployment, requests: list[Ask], pool: ThreadPoolExecutor, *, api_key: str = ""
) -> list["Future[Stream]"]:
    """Streams that have all brought their first chunk; pool needs a thread for each."""
    begun = Barrier(len(requests) + 1, timeout=120)
    streams = [pool.submit(ask, deployment, one, api_key=api_key, on_begin=begun.wait) for one in requests]
    begun.wait()
    return streams


def expected(checkpoint: Any, requests: list[Ask]) -> list[RequestOutput]:
    """What one engine in this process says, undisturbed."""
    with LLM(checkpoint, device="cpu", dtype="float32") as llm:
        return llm.generate([request.prompt for request in requests], [request.sampling for request in requests])


def _lines(response: httpx.Response) -> Iterator[str]:
    """Of an event stream. httpx would also split at the other line ends Unicode knows, which answers may hold."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in lines)


def _take(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        stream.error = chunk["error"]
        return
    for choice in chunk["choices"]:
        stream.text += choice["text"]
        stream.logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
        if choice["finish_reason"]:
            stream.finish_reasons.append(choice["finish_reason"])
            stream.record = chunk["pdserve"]
