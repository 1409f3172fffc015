"""A Ray cluster of our own: `python -m pdserve.launch.ray_head`, started by cluster.ray_cluster.

Ray's helper processes notice late, up to a minute, that the rest is gone. So all of them stay in this
process's group, and whatever ends this process, the supervisor's death included, ends the group.
"""

import asyncio
import logging
import math
import os
import select
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from pdserve.cluster.ray_cluster import take_back_sigterm
from pdserve.core.parent_death import die_with_parent
from pdserve.launch.child import Parent, run_child

_KILL_TIME = 1.0
"""Seconds for the kernel to end a process."""
_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's minimum: nothing of ours travels through its object store."""


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    """Start the cluster, answer with its address, and hold it until told to end."""
    directory = str(payload["directory"])
    _end_with_group(directory, int(payload["parent_pid"]))
    # Workers are started when there is something for them to do.
    os.environ.update(RAY_enable_worker_prestart="0", RAY_prestart_worker_first_driver="0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    loop = asyncio.get_running_loop()
    # Ray asks the kernel to end its processes with the thread that started them: this one stays.
    with ThreadPoolExecutor(1) as thread:
        address = await loop.run_in_executor(thread, _start, directory, payload["node_ip"], payload["cpus"])
        take_back_sigterm()
        for pid in _pillars():
            loop.add_reader(os.pidfd_open(pid), os.kill, os.getpid(), signal.SIGTERM)
        parent.ready(address=address)
        await drain.wait()


def _start(directory: str, node_ip: str, cpus: float) -> str:
    ray.init(
        address="local",
        num_cpus=max(math.ceil(cpus), os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=node_ip,
        _temp_dir=directory,
    )
    return str(ray.get_runtime_context().gcs_address)


def _pillars() -> list[int]:
    """The processes a cluster cannot do without; when one of them ends, all do, and another is started."""
    tasks = Path("/proc/self/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() in ("gcs_server", "raylet")]


def _group() -> list[int]:
    """The others in this process's group."""
    others = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in others if pid != os.getpid() and _group_of(pid) == os.getpid()]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _end_with_group(directory: str, parent_pid: int) -> None:
    """From now on SIGTERM, which the parent's death sends as well, kills the whole group at once."""

    def end() -> None:
        dying = []
        for pid in _group():
            with suppress(ProcessLookupError):
                dying.append(os.pidfd_open(pid))
                os.kill(pid, signal.SIGKILL)
        for pidfd in dying:
            select.select([pidfd], [], [], _KILL_TIME)
        shutil.rmtree(directory, ignore_errors=True)  # nobody writes logs any more
        os.killpg(os.getpid(), signal.SIGKILL)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    die_with_parent(parent_pid, signal.SIGTERM)


if __name__ == "__main__":
    run_child(main)
