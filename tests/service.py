"""What a Kubernetes Service does with connections: a new one goes to a pod that is ready and not being deleted, by
turns, and stays there, whatever becomes of the pod."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

import httpx

_LOOK_EVERY = 0.2
"""Seconds between looks at the pods: so long a connection may still go to one that is being deleted."""
_FIND_TIMEOUT = 60.0
_CHUNK = 65536


class Service:
    """Use as an async context. pods gives the addresses (hosts) of those that are not being deleted."""

    def __init__(self, pods: Callable[[], Iterable[str]], *, probe_port: int = 8000) -> None:
        self._pods = pods
        self._probe_port = probe_port
        self._ready: list[str] = []
        self._found = asyncio.Event()
        self._turn = 0
        self._looking: asyncio.Task[None] | None = None
        self._listening: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, port: int) -> str:
        """host:port at which connections are taken for that port of the pods, once one of them is ready."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        await asyncio.wait_for(self._found.wait(), _FIND_TIMEOUT)

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._carry(reader, writer, port))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._listening.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        for server in self._listening:
            server.close()
        tasks = [*self._connections, *filter(None, [self._looking])]
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def _look(self) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                pods = list(self._pods())
                answers = await asyncio.gather(*(self._is_ready(client, pod) for pod in pods))
                self._ready = [pod for pod, ready in zip(pods, answers, strict=True) if ready]
                if self._ready:
                    self._found.set()
                await asyncio.sleep(_LOOK_EVERY)

    async def _is_ready(self, client: httpx.AsyncClient, pod: str) -> bool:
        with suppress(httpx.HTTPError):
            url = f"http://{pod}:{self._probe_port}/ready"
            return (await client.get(url, headers={"connection": "close"})).status_code == 200
        return False

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        try:
            if not self._ready:
                return
            self._turn += 1
            there, back = await asyncio.open_connection(self._ready[self._turn % len(self._ready)], port)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_copy(reader, back))
                    group.create_task(_copy(there, writer))
            finally:
                back.transport.abort()
        except* OSError:
            pass  # who asked sees a connection that ends
        finally:
            writer.transport.abort()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Until the source ends, which the target is then told of."""
    while piece := await source.read(_CHUNK):
        target.write(piece)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()
