"""How busy the rest of the machine is, so that a bench on a shared one can tell which of its rounds to believe."""

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.1
"""A round counts as quiet when others use less than this part of all cores."""

WATCH = 0.3

_IDLE = (3, 4)
"""idle and iowait in the first line of /proc/stat."""


@dataclass(frozen=True)
class Usage:
    """Clock ticks of all cores, those in which they worked, and those in which they worked for us."""

    total: int
    busy: int
    own: int

    def others_since(self, earlier: "Usage") -> float:
        """Part of all cores that neither idled nor worked for us."""
        total = max(1, self.total - earlier.total)
        return max(0.0, (self.busy - earlier.busy) - (self.own - earlier.own)) / total


def usage(pids: Iterable[int]) -> Usage:
    """Now; the processes given, and this one, are us."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = sum(ticks[index] for index in _IDLE)
    return Usage(sum(ticks), sum(ticks) - idle, sum(map(_ticks_of, (os.getpid(), *pids))))


async def until_quiet(pids: Iterable[int], deadline: float) -> None:
    """Wait until others have been quiet for WATCH seconds, or until the deadline (monotonic)."""
    pids = tuple(pids)
    while time.monotonic() < deadline:
        before = usage(pids)
        await asyncio.sleep(WATCH)
        if usage(pids).others_since(before) < QUIET:
            return


def _ticks_of(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
