"""Restarts as Kubernetes makes them, under a load whose every answer is looked at."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.background import background
from tests.deployment import START_TIMEOUT
from tests.pods import Pod, Pods
from tests.service import Service
from tests.steady_load import Prompt, SteadyLoad, Tally

PROMPTS = [
    Prompt(tuple((11 * number + 7 * token) % 250 for token in range(24 + 16 * number)), 24 + 40 * (number % 4))
    for number in range(12)
]


@contextmanager
def loaded(routers: Callable[[], list[str]], *, every: float, key: str = "") -> Iterator[Tally]:
    """A request each so many seconds, through a Service of routers (those that are not being deleted, by their hosts),
    while the context is open. When it is left, all is answered and the tally complete."""
    with background() as loop:
        service = Service(routers)
        load = SteadyLoad(loop.do(service.open(8000)), loop.do(service.open(8001)), key)
        stop = asyncio.Event()
        try:
            loop.do(load.learn(PROMPTS))
            running = loop.start(load.run(every, stop))
            yield load.tally
            loop.do(_set(stop))
            running.result(120)
        finally:
            loop.do(service.close())


def replace_router(release: Pods, old: Pod) -> None:
    """With maxSurge 1 and maxUnavailable 0: another one is ready first."""
    new = release.add_router()
    new.start()
    _until_ready(new)
    if release.router is old:
        release.router = new
    end(old)


def restart(pod: Pod) -> None:
    """As a StatefulSet replaces a pod: the next of the name starts when it has ended."""
    end(pod)
    pod.start()
    _until_ready(pod)


def end(pod: Pod) -> None:
    pod.delete()
    code = pod.ended()
    assert code == 0, pod.said()


def _until_ready(pod: Pod) -> None:
    pod.until("startupProbe", 200, START_TIMEOUT)
    pod.until("readinessProbe", 200)


async def _set(event: asyncio.Event) -> None:
    event.set()
