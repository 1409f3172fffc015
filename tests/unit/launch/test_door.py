"""Where an engine's process takes on the hosts of its other ranks, or says why nobody could come in."""

import socket
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.launch.door import open_rank_door
from pdserve.worker.spec import WorkerSpec

SPEC = WorkerSpec(model=Path("unread"), engine_id="d", epoch=1, num_blocks=1, tensor_parallel=4)


async def test_an_engine_on_one_machine_has_none() -> None:
    assert await open_rank_door({}, SPEC, hosts=1) is None


async def test_a_launcher_s_socket_is_taken_over_and_the_ranks_are_shared_out() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    door = await open_rank_door({"door": listener.detach()}, SPEC, hosts=2)
    assert door
    assert door.ranks_each == 2
    await door.close()


async def test_a_port_that_is_taken_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--gang-port: cannot listen on 127.0.0.1:{port}: "):
            await open_rank_door({"gang_port": port}, SPEC, hosts=2)
