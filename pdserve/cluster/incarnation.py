"""One process of a member, from launch to end, reported as events of cluster.plan."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from signal import Signals

from pdserve.cluster.heartbeat import heartbeats
from pdserve.cluster.launcher import Launched, Launcher, LaunchSpec
from pdserve.cluster.plan import BecameReady, Ended, Event, Heard, Spawned
from pdserve.core.errors import CheckpointError, ConfigError, PdserveError, StaleEpoch

_RECONNECT = 0.2
"""Seconds before a heartbeat session that ended is opened again."""


class Incarnation:
    """Owns the process: cancelling `run` kills it and waits until it is gone.

    heartbeat: the process is an engine, which is watched over its session once it is ready.
    """

    def __init__(self, id: str, epoch: int, *, heartbeat: bool, emit: Callable[[Event], None]) -> None:
        self.id = id
        self.epoch = epoch
        self._heartbeat = heartbeat
        self._emit = emit
        self._launched: Launched | None = None
        self._asked: Callable[[Launched], None] | None = None
        self._over = False

    async def run(self, launcher: Launcher, spec: LaunchSpec) -> None:
        """Emits Spawned, BecameReady, Heard …, and Ended last, unless cancelled."""
        try:
            self._launched = await launcher.launch(spec)
        except OSError as error:
            self._emit_end(f"could not be started: {error}")
            return
        try:
            await self._live(self._launched)
        finally:
            self._launched.kill()
            await self._launched.ended()

    def terminate(self) -> None:
        self._ask(lambda launched: launched.terminate())

    def kill(self) -> None:
        self._ask(lambda launched: launched.kill())

    def _ask(self, ask: Callable[[Launched], None]) -> None:
        """Now, or as soon as there is a process to ask."""
        self._asked = ask
        if self._launched:
            ask(self._launched)

    async def _live(self, launched: Launched) -> None:
        if self._asked:
            self._asked(launched)
        self._emit(Spawned(id=self.id, epoch=self.epoch, pid=launched.pid))
        try:
            facts = await launched.ready()
        except PdserveError as error:
            await launched.ended()
            self._emit_end(str(error), refusal=isinstance(error, ConfigError | CheckpointError))
            return
        address = str(facts.get("address", ""))
        self._emit(BecameReady(id=self.id, epoch=self.epoch, address=address))
        listening = asyncio.create_task(self._listen(address)) if self._heartbeat else None
        try:
            code = await launched.ended()
        finally:
            self._over = True
            if listening:
                listening.cancel()
                with suppress(asyncio.CancelledError):
                    await listening
        self._emit_end(f"killed by {Signals(-code).name}" if code < 0 else f"exited with code {code}")

    async def _listen(self, address: str) -> None:
        while not self._over:  # a cancellation that meets the end of a call may be lost in grpc
            with suppress(StaleEpoch):
                async with aclosing(heartbeats(address, self.epoch)) as beats:
                    async for _ in beats:
                        self._emit(Heard(id=self.id, epoch=self.epoch))
            await asyncio.sleep(_RECONNECT)

    def _emit_end(self, cause: str, refusal: bool = False) -> None:
        self._emit(Ended(id=self.id, epoch=self.epoch, cause=cause, refusal=refusal))
