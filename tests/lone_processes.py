"""`pdserve engine` and `pdserve rank-host`, started as by hand."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.pods import PDSERVE


@contextmanager
def running(log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[bytes]"]:
    """`pdserve ARGUMENTS`, its output appended to the log; killed at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen([*prefix, *PDSERVE, *arguments], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(holds: Callable[[], bool], within: float, log: Path) -> None:
    """Wait; after so many seconds, fail with the log."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.1)


def ready(address: str) -> bool:
    """By its probe."""
    try:
        return httpx.get(f"http://{address}:8101/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
