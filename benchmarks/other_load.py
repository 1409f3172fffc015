"""How much of this machine others used while something was measured."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_TICK = os.sysconf("SC_CLK_TCK")


class Moment(NamedTuple):
    """Seconds: of the clock, of CPU time used by everybody, of CPU time used by our processes."""

    at: float
    everybody: float
    ours: float

    @classmethod
    def now(cls, pids: Iterable[int]) -> "Moment":
        """pids: our processes; threads of theirs count, children do not."""
        first, *_ = Path("/proc/stat").read_text().splitlines()
        user, nice, system, _idle, _wait, irq, softirq = (int(field) for field in first.split()[1:8])
        return cls(time.monotonic(), (user + nice + system + irq + softirq) / _TICK, sum(map(_used, pids)))


def others_cores(before: Moment, after: Moment) -> float:
    """Cores that were busy with other work, on average."""
    used = after.everybody - before.everybody - (after.ours - before.ours)
    return max(0.0, used / (after.at - before.at))


def _used(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICK
