"""A gateway and its fronts in one process, over a real socket; engines play a script."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from pdserve.config.times import Times
from pdserve.core.clock import SystemClock
from pdserve.core.request import Request
from pdserve.core.tasks import running
from pdserve.dispatch.sessions import SessionPool
from pdserve.gateway.fronts.claims import RemoteClaims
from pdserve.gateway.fronts.hub import FrontHub
from pdserve.gateway.fronts.remote import GatewayLine
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.router.directory import Naming
from pdserve.router.kv_index import KVIndex
from pdserve.router.policies import KVAware
from pdserve.router.router import PreparedPrompt, Router
from pdserve.router.rules import RoutingRules
from pdserve.telemetry.totals import Growth
from tests.scripted_generator import ScriptedGenerator
from tests.tiny_tokenizers import MODEL, byte_level

NAMING: Naming = ("1", 16)


class NotedHashes(Router):
    """Notes the hashes that came with each request."""

    def __init__(self) -> None:
        rules = RoutingRules()
        super().__init__(KVAware(rules), KVIndex(), rules)
        self.kept: dict[str, PreparedPrompt] = {}

    @property
    def namings(self) -> tuple[Naming, ...]:
        return (NAMING,)

    def keep(self, request: Request, prepared: PreparedPrompt) -> None:
        self.kept[request.id] = prepared


@dataclass
class Front:
    """One front: its line to the gateway, and the gateway as its clients see it."""

    line: GatewayLine
    gateway: Gateway
    claims: RemoteClaims


@dataclass
class Fronted:
    """The gateway's process, and its fronts."""

    gateway: Gateway
    hub: FrontHub
    routes: NotedHashes
    path: str
    fronts: list[Front] = field(default_factory=list)

    async def metric(self, line: str) -> float:
        """The value on the line of the exposition that begins so."""
        lines = (await self.gateway.exposition()).decode().splitlines()
        return next((float(one.split()[-1]) for one in lines if one.startswith(f"{line} ")), 0.0)


@asynccontextmanager
async def fronted(
    generator: ScriptedGenerator, count: int = 1, settings: GatewaySettings | None = None
) -> AsyncIterator[Fronted]:
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(byte_level(Path(folder) / "model"))
        path = str(Path(folder) / "gateway")
        async with AsyncExitStack() as stack:
            whole = open_hub(generator, tokenizer, path)
            await whole.hub.listen(path)
            await stack.enter_async_context(running(whole.hub.run()))
            stack.push_async_callback(whole.hub.close)
            for _ in range(count):
                front = open_front(tokenizer, path, settings)
                await stack.enter_async_context(running(front.line.run()))
                stack.push_async_callback(front.line.close)
                whole.fronts.append(front)
            async with asyncio.timeout(10):
                for front in whole.fronts:
                    await front.line.heard()
            yield whole


def open_hub(generator: ScriptedGenerator, tokenizer: Tokenizer, path: str) -> Fronted:
    gateway, routes = Gateway(generator, tokenizer, MODEL), NotedHashes()
    return Fronted(gateway, FrontHub(gateway, routes, SessionPool(Times(), SystemClock())), routes, path)


def open_front(tokenizer: Tokenizer, path: str, settings: GatewaySettings | None = None) -> Front:
    line = GatewayLine(path, lambda: growth())
    claims = RemoteClaims(line)
    gateway = Gateway(line, tokenizer, MODEL, settings, claims=claims, degraded=line.degraded, elsewhere=line)
    growth = Growth(gateway.metrics.registry)
    gateway.tell_ends(line.tell_end)
    return Front(line, gateway, claims)
