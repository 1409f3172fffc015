"""The inside of a Ray actor: starts one process as its child and answers for it to cluster.ray_launcher.

The child is started as by the process launcher, so it lives in an interpreter of its own and dies with
this actor's process, and the actor with its Ray node. Requests, tokens and KV never pass through here.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pdserve.cluster.gang import address_of, open_door
from pdserve.cluster.launcher import LaunchSpec
from pdserve.cluster.process_launcher import LaunchedProcess, ProcessLauncher
from pdserve.core.errors import PdserveError
from pdserve.core.parent_death import die_with_parent

_KEPT_LINES = 1000
"""Lines of the child's log held for a supervisor that does not keep up; older ones are dropped."""


class RayHost:
    """Made and called by Ray. Answers are plain values: errors cross as their wire form, never pickled."""

    def __init__(self) -> None:
        die_with_parent(os.getppid())  # Ray's own way takes a second, and a frozen host would not go it
        self._child: LaunchedProcess | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._news = asyncio.Event()
        self._over = False

    async def start(self, name: str, module: str, payload: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Start the child, which serves on this node's address; its pid and this installation's version."""
        return await self._start(LaunchSpec(name=name, module=module, payload=_at_home(payload), threads=threads), None)

    async def lead(self, name: str, module: str, payload: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Start the child with a door on this node's address; start's facts, and the door's host:port."""
        told = _at_home(payload)
        with open_door(told["host"]) as door:
            spec = LaunchSpec(name=name, module=module, payload=told, threads=threads)
            return {**await self._start(spec, door), "door": address_of(door)}

    async def ready(self) -> dict[str, Any]:
        """{"ready": facts} or {"error": {"code", "message"}}, once the child has answered or ended."""
        try:
            return {"ready": await self._started().ready()}
        except PdserveError as error:
            return {"error": {"code": error.code, "message": str(error)}}

    async def ended(self) -> int:
        """The exit code, negative for a signal."""
        code = await self._started().ended()
        self._over = True
        self._news.set()
        return code

    async def lines(self) -> list[str]:
        """What the child has logged since the last call, waiting for something; empty at its end."""
        while not self._lines and not self._over:
            self._news.clear()
            await self._news.wait()
        lines = list(self._lines)
        self._lines.clear()
        return lines

    async def terminate(self) -> None:
        self._started().terminate()

    async def kill(self) -> None:
        self._started().kill()

    async def _start(self, spec: LaunchSpec, door: socket.socket | None) -> dict[str, Any]:
        post = asyncio.get_running_loop().call_soon_threadsafe
        launcher = ProcessLauncher(name_lines=False, write=lambda line: post(self._keep, line))
        self._child = await launcher.start(spec, door)
        return {"pid": self._child.pid, "version": version("pdserve")}

    def _keep(self, line: str) -> None:
        self._lines.append(line)
        self._news.set()

    def _started(self) -> LaunchedProcess:
        if self._child is None:
            raise RuntimeError("the host was asked about a child it has not started")
        return self._child


def _at_home(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What a child on this node is told."""
    from ray.util import get_node_ip_address

    return {**payload, "host": get_node_ip_address()}
