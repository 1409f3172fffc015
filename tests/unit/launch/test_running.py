"""From the first signal to the exit code."""

import asyncio
import os
import signal
from typing import Any

import pytest

from pdserve.config.times import Times
from pdserve.core.errors import ConfigError
from pdserve.launch.running import run_until_signal


class Breaking:
    """A supervisor whose processes never end when they drain, and which itself ends amid that."""

    def __init__(self) -> None:
        self._draining = asyncio.Event()

    async def run(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await self._draining.wait()
        raise ConfigError("what it says")

    async def drain(self) -> None:
        self._draining.set()
        await asyncio.Event().wait()


async def test_a_supervisor_that_ends_while_it_drains_needs_no_second_signal() -> None:
    supervisor: Any = Breaking()
    with pytest.raises(ConfigError, match="what it says"):
        await asyncio.wait_for(run_until_signal(supervisor, Times()), 20)
