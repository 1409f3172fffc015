"""One process of a member, from launch to end, reported as events of cluster.plan."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress

from pdserve.cluster.heartbeat import SignsOfLife
from pdserve.cluster.launcher import Launched, Launcher, LaunchSpec
from pdserve.cluster.plan import BecameReady, Ended, Event, Heard, Spawned
from pdserve.core.errors import CheckpointError, ConfigError, MalformedMessage, PdserveError, StaleEpoch
from pdserve.core.exit_code import manner_of_end

_RECONNECT = 0.2
"""Seconds before a heartbeat session that ended is opened again."""


class Incarnation:
    """Owns the process: cancelling `run` kills it and waits until it is gone.

    signs: the signs of life of one that is ready, by its epoch and the address it is to be asked at: its own unless it
    says otherwise.
    """

    def __init__(self, id: str, epoch: int, *, signs: SignsOfLife, emit: Callable[[Event], None]) -> None:
        self.id = id
        self.epoch = epoch
        self._signs = signs
        self._emit = emit
        self._launching: asyncio.Future[Launched] | None = None
        self._launched: Launched | None = None
        self._asked: Callable[[Launched], None] | None = None
        self._over = False

    async def run(self, launcher: Launcher, spec: LaunchSpec) -> None:
        """Emits Spawned, BecameReady, Heard …, and Ended last, unless cancelled."""
        try:
            self._launched = await self._launch(launcher, spec)
        except OSError as error:
            self._emit_end(f"could not be started: {error}")
        except PdserveError as error:
            self._emit_end(str(error), refusal=isinstance(error, ConfigError))
        if self._launched is None:
            return
        try:
            await self._live(self._launched)
        finally:
            self._launched.kill()
            await self._launched.ended()

    async def _launch(self, launcher: Launcher, spec: LaunchSpec) -> Launched | None:
        """None when it was called off: a cluster may have no room for a long time."""
        if not self._asked:
            self._launching = asyncio.ensure_future(launcher.launch(spec))
            try:
                return await self._launching
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task and task.cancelling():
                    raise
        self._emit_end("called off before it was started")
        return None

    def terminate(self) -> None:
        self._ask(lambda launched: launched.terminate())

    def kill(self) -> None:
        self._ask(lambda launched: launched.kill())

    def _ask(self, ask: Callable[[Launched], None]) -> None:
        """Now; a launch that is still under way is called off, unless it has just succeeded."""
        self._asked = ask
        if self._launched:
            ask(self._launched)
        elif self._launching:
            self._launching.cancel()

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
        listening = asyncio.create_task(self._listen(str(facts.get("probe", address))))
        try:
            code = await launched.ended()
        finally:
            self._over = True
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
        self._emit_end(manner_of_end(code))

    async def _listen(self, address: str) -> None:
        while not self._over:  # a cancellation that meets the end of a call may be lost in grpc
            with suppress(StaleEpoch, MalformedMessage):
                async with aclosing(self._signs(address, self.epoch)) as signs:
                    async for _ in signs:
                        self._emit(Heard(id=self.id, epoch=self.epoch))
            await asyncio.sleep(_RECONNECT)

    def _emit_end(self, cause: str, refusal: bool = False) -> None:
        self._emit(Ended(id=self.id, epoch=self.epoch, cause=cause, refusal=refusal))
