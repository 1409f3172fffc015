"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from contextlib import suppress

PAUSE = 0.1


def eventually(
    holds: Callable[[], bool],
    within: float = 60.0,
    said: Callable[[], str] = str,
    despite: tuple[type[Exception], ...] = (),
) -> None:
    """Ask until a condition holds, also after these exceptions; after so many seconds, fail with what was said."""
    deadline = time.monotonic() + within
    while True:
        with suppress(*despite):
            if holds():
                return
        assert time.monotonic() < deadline, f"did not happen within {within:g} s; {said()}"
        time.sleep(PAUSE)
