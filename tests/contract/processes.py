"""Waiting for processes that are not our children."""

import os
import select
from contextlib import suppress
from pathlib import Path


def is_gone(pid: int, within: float) -> bool:
    """Whether a process has ended (a zombie has), waiting up to `within` seconds for it."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            return bool(select.select([fd], [], [], within)[0])
        finally:
            os.close(fd)
    return True


def count_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
