"""Lines of several routers to one Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

from pdserve.core.clock import SystemClock
from pdserve.core.tasks import running
from pdserve.shared.link import RedisLink
from tests.redis_server import RedisServer


@asynccontextmanager
async def connected(
    server: RedisServer, count: int, heartbeat: float = 0.2, namespace: str = ""
) -> AsyncIterator[tuple[RedisLink, ...]]:
    """So many lines that answer, by default in a namespace of their own."""
    namespace = namespace or uuid4().hex
    links = [RedisLink(server.url, namespace, SystemClock(), heartbeat=heartbeat, answer=5.0) for _ in range(count)]
    async with AsyncExitStack() as stack:
        for link in links:
            stack.push_async_callback(link.close)
            await stack.enter_async_context(running(link.run()))
        async with asyncio.timeout(20):
            while not all(link.up for link in links):
                await asyncio.sleep(0.01)
        yield tuple(links)
