"""Where an engine's process takes on the hosts of its other ranks."""

import socket
from collections.abc import Mapping
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.worker.rank_door import RankDoor
from pdserve.worker.spec import WorkerSpec


async def open_rank_door(payload: Mapping[str, Any], spec: WorkerSpec, hosts: int) -> RankDoor | None:
    """None for an engine on one machine. Raises ConfigError where nobody could come in."""
    if hosts == 1:
        return None
    return await RankDoor.open(
        _listener(payload, spec.host), hosts=hosts, ranks=spec.tensor_parallel, threads=spec.threads
    )


def _listener(payload: Mapping[str, Any], host: str) -> socket.socket:
    """The socket a launcher has made, who tells the hosts of it; otherwise one at the port they were told."""
    if (fd := payload.get("door")) is not None:
        return socket.socket(fileno=fd)
    port = payload["gang_port"]
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"--gang-port: cannot listen on {host}:{port}: {error.strerror or error}") from error
