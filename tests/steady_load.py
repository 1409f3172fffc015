"""A load that goes on whatever happens: a request every so often whether earlier ones have ended or not, from clients
that keep their connections and never try again."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc
import httpx

from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import InferenceStub

_TIMEOUT = 90.0
_CLIENTS = 3
"""Of each kind."""


@dataclass(frozen=True)
class Prompt:
    """Greedy, to exactly max_tokens."""

    tokens: tuple[int, ...]
    max_tokens: int


@dataclass
class Tally:
    """How many requests there were, by the kind of their client, and what was wrong with answers."""

    asked: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class SteadyLoad:
    """Addresses are host:port of HTTP and gRPC; key opens both if they want one."""

    def __init__(self, http: str, grpc_address: str, key: str) -> None:
        self._http = http
        self._grpc = grpc_address
        self._authorization = {"authorization": f"Bearer {key}"} if key else {}
        self._wanted: dict[Prompt, str] = {}
        self.tally = Tally()

    async def learn(self, prompts: Sequence[Prompt]) -> None:
        """What is answered to each while nothing happens is what must be answered from then on."""
        async with self._http_client() as client:
            for prompt in prompts:
                self._wanted[prompt] = await _streamed(client, prompt)

    async def run(self, every: float, stop: asyncio.Event) -> None:
        """Ask until stop is set, and until all is answered."""
        async with AsyncExitStack() as stack:
            asks: list[tuple[str, httpx.AsyncClient | InferenceStub]] = []
            for _ in range(_CLIENTS):
                client = await stack.enter_async_context(self._http_client())
                stub = await stack.enter_async_context(self._stub())
                asks += [("stream", client), ("whole", client), ("grpc", stub)]
            prompts = list(self._wanted)
            async with asyncio.TaskGroup() as group:
                number = 0
                while not stop.is_set():
                    kind, client_or_stub = asks[number % len(asks)]
                    prompt = prompts[number % len(prompts)]
                    group.create_task(self._one(kind, client_or_stub, prompt))
                    number += 1
                    await asyncio.sleep(every)

    async def _one(self, kind: str, client: "httpx.AsyncClient | InferenceStub", prompt: Prompt) -> None:
        self.tally.asked[kind] += 1
        begun = time.strftime("%H:%M:%S")
        try:
            if isinstance(client, httpx.AsyncClient):
                said = await (_streamed if kind == "stream" else _whole)(client, prompt)
            else:
                said = await self._called(client, prompt)
        except (httpx.HTTPError, grpc.aio.AioRpcError, Refused) as error:
            self.tally.failures.append(f"{begun} {kind}: {error!r}")
            return
        if said != self._wanted[prompt]:
            self.tally.failures.append(f"{begun} {kind}: said {said!r} instead of {self._wanted[prompt]!r}")

    async def _called(self, stub: InferenceStub, prompt: Prompt) -> str:
        sampling = pb.GenerateRequest.SamplingParams(temperature=0, max_tokens=prompt.max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt.tokens), sampling=sampling)
        metadata = tuple(self._authorization.items())
        said, reason = "", pb.FINISH_REASON_UNSPECIFIED
        async for message in stub.Generate(request, metadata=metadata, timeout=_TIMEOUT):
            said += message.text
            reason = message.finish_reason
        if reason != pb.FINISH_REASON_LENGTH:
            raise Refused(f"ended with {reason}")
        return said

    def _http_client(self) -> httpx.AsyncClient:
        url = f"http://{self._http}"
        return httpx.AsyncClient(base_url=url, headers=self._authorization, timeout=_TIMEOUT, verify=False)

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[InferenceStub]:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(self._grpc, options=options) as channel:
            yield InferenceStub(channel)


class Refused(Exception):
    """An answer that is none."""


def _body(prompt: Prompt, *, stream: bool) -> dict[str, object]:
    return {
        "prompt": list(prompt.tokens),
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


async def _streamed(client: httpx.AsyncClient, prompt: Prompt) -> str:
    said, ends = "", []
    async with client.stream("POST", "/v1/completions", json=_body(prompt, stream=True)) as answer:
        if answer.status_code != 200:
            raise Refused(f"{answer.status_code} {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise Refused(str(event["error"]))
                for choice in event["choices"]:
                    said += choice["text"]
                    ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    if ends != ["length"]:
        raise Refused(f"ended with {ends}")
    return said


async def _whole(client: httpx.AsyncClient, prompt: Prompt) -> str:
    answer = await client.post("/v1/completions", json=_body(prompt, stream=False))
    if answer.status_code != 200:
        raise Refused(f"{answer.status_code} {answer.text}")
    (choice,) = answer.json()["choices"]
    if choice["finish_reason"] != "length":
        raise Refused(f"ended with {choice['finish_reason']}")
    text: str = choice["text"]
    return text
