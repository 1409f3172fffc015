"""What the model check does without: threads and sockets."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch
from weakref import WeakSet

from pdserve.simulator.virtual_time import VirtualTimeLoop
from pdserve.transfer.pump import TransferPump
from tests.model_check.network import Network, Stub

_T = TypeVar("_T")


class InlineLoop(VirtualTimeLoop):
    """Virtual time, without threads: what would run in one runs at once."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., _T], *args: Any
    ) -> "asyncio.Future[_T]":
        done: asyncio.Future[_T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _InlineExecutor(Executor):
    """Runs what it is given at once."""

    def __init__(self, **_: Any) -> None:
        pass

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> "Future[_T]":
        done: Future[_T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class _NoThread:
    """A pump's thread that never runs: jobs run where they are submitted, polls when the fabric says so."""

    def __init__(self, **_: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass

    def is_alive(self) -> bool:
        return False


@contextmanager
def without_threads_and_sockets(
    network: Network, pumps: WeakSet[TransferPump], accuse: Callable[[str], None]
) -> Iterator[None]:
    """Links go over the network, jobs of pumps, which are noted, run where they are submitted."""

    def submit(pump: TransferPump, job: Callable[[], None]) -> bool:
        if pump._closing:
            return False
        pumps.add(pump)
        job()
        pump._poll()
        pump._drop_leaving()
        return True

    class Log:
        """Hears of defects that were survived."""

        def exception(self, event: str, **_: object) -> None:
            accuse(event)

        error = exception

        def warning(self, event: str, **_: object) -> None:
            """No defect."""

    with ExitStack() as stack:
        stack.enter_context(patch("pdserve.transfer.pump.threading.Thread", _NoThread))
        stack.enter_context(patch.object(TransferPump, "_submit", submit))
        stack.enter_context(patch("pdserve.transfer.service.ThreadPoolExecutor", _InlineExecutor))
        stack.enter_context(patch("pdserve.engine.handoff_link.open_channel", network.open_channel))
        stack.enter_context(patch("pdserve.engine.handoff_link.HandoffServiceStub", Stub))
        for module in ("handoff_source", "handoff_target", "region_pulls", "prefix_fetches"):
            stack.enter_context(patch(f"pdserve.engine.{module}._log", Log()))
        yield
