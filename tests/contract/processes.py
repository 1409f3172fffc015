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


def descendants(pid: int) -> list[int]:
    """Process ids of everything a process has started that has not lost its parent."""
    direct: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            direct += [int(child) for child in (thread / "children").read_text().split()]
    return [*direct, *(deeper for child in direct for deeper in descendants(child))]


def parent_of(pid: int) -> int:
    """Process id of the parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def environment_of(pid: int) -> dict[str, str]:
    """The environment a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def count_files(directory: str) -> int:
    """Files below a directory, which need not exist."""
    return sum(1 for path in Path(directory).rglob("*") if not path.is_dir())
