"""Gateways whose engines play a script are replaced under a request every 5 ms: who leaves loses none."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from pdserve.config.schema import Config, DiscoveryConfig
from pdserve.config.times import Times
from pdserve.core.request import FinishReason, Request
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.grpc.server import GrpcServer
from pdserve.gateway.http.app import create_app
from pdserve.gateway.serve import bind, serve_http
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.launch.edge import leave
from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import InferenceStub
from pdserve.telemetry.record import RequestRecord
from tests.scripted_generator import ScriptedGenerator
from tests.service import Service
from tests.steady_load import Prompt, SteadyLoad
from tests.tiny_tokenizers import MODEL, byte_level

PROMPTS = [Prompt((number, 7), 4 + 2 * number) for number in range(8)]
TOKEN_TIME = 0.005


class Counting(ScriptedGenerator):
    """Says as many tokens as it is asked for; which ones, the prompt decides."""

    async def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]:
        last = request.sampling.max_tokens - 1
        for index in range(last + 1):
            await asyncio.sleep(TOKEN_TIME)
            token = (request.prompt_token_ids[0] + index) % 80
            end = FinishReason.LENGTH if index == last else None
            yield TokenDelta(request_id=request.id, index=index, token_ids=(token,), finish_reason=end)


class Router:
    def __init__(self, host: str, tokenizer: Tokenizer, connection_age: float) -> None:
        settings = GatewaySettings(connection_age=connection_age)
        times = Times(connection_age=connection_age, connection_idle=1.0)
        self._config = Config(discovery=DiscoveryConfig(engines=("elsewhere:1",)), times=times)
        self.host = host
        self.gateway = Gateway(Counting(lambda request: []), tokenizer, MODEL, settings)
        self._listener = bind(host, 8000)
        self._grpc = GrpcServer(self.gateway, host, 8001)
        self._told = asyncio.Event()
        self._serving = asyncio.create_task(self._serve())

    async def end(self) -> None:
        """As on SIGTERM; return when the process would have ended."""
        self._told.set()
        await self._serving

    async def _serve(self) -> None:
        leaving, stop = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(serve_http(create_app(self.gateway), self._listener, stop, 2.0, leaving))
            group.create_task(self._grpc.serve(stop, 2.0, leaving))
            await self._told.wait()
            await leave(self.gateway.intake, self._config, leaving)
            stop.set()


def network() -> str:
    """The first three bytes of loopback addresses of which nobody else makes use."""
    return f"127.{random.randint(16, 250)}.{random.randint(1, 250)}"


@asynccontextmanager
async def service_of(routers: list[Router]) -> AsyncIterator[SteadyLoad]:
    """A load through a Service of the routers in the list; they end with the context."""
    service = Service(lambda: [router.host for router in routers])
    try:
        yield SteadyLoad(await service.open(8000), await service.open(8001), key="")
    finally:
        await service.close()
        await asyncio.gather(*(router.end() for router in routers))


async def test_gateways_that_are_replaced_lose_no_request(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    subnet = network()
    routers = [Router(f"{subnet}.{number}", tokenizer, 0.8) for number in (1, 2)]
    async with service_of(routers) as load:
        await load.learn(PROMPTS)
        stop = asyncio.Event()
        running = asyncio.create_task(load.run(0.005, stop))
        for number in (3, 4):
            routers.append(Router(f"{subnet}.{number}", tokenizer, 0.8))
            await asyncio.sleep(0.5)
            await asyncio.wait_for(routers.pop(0).end(), 30)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.wait_for(running, 60)
    assert load.tally.failures == []
    assert min(load.tally.asked[kind] for kind in ("stream", "whole", "grpc")) > 50


async def test_a_grpc_client_that_pauses_is_served_while_its_router_leaves(tmp_path: Path) -> None:
    router = Router(f"{network()}.1", Tokenizer.load(byte_level(tmp_path)), 3.0)
    async with grpc.aio.insecure_channel(f"{router.host}:8001") as channel:
        stub = InferenceStub(channel)
        await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
        ending = asyncio.create_task(router.end())
        await asyncio.sleep(1.5)  # longer than what HTTP connections are kept for without a request
        await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
    await asyncio.wait_for(ending, 10)
