"""A child that behaves as its payload says; run by tests/contract/test_launchers.py and the supervisor's tests."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from pdserve.core.errors import CheckpointError, EngineDied
from pdserve.launch.child import Parent, run_child

MISSED = 70
"""Exit code of a leader that has lost a follower."""


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    match payload["behaviour"]:
        case "refuse":
            raise CheckpointError("no config.json in /nowhere")
        case "crash":
            print("something is wrong", file=sys.stderr)
            os._exit(3)
        case "lose":
            parent.ready()
            raise EngineDied("its worker was killed")
        case "nonsense":
            os.write(payload["ready_fd"], b"[1, 2]\n")
        case "silent":
            pass
        case "noisy":
            print("{'not': 'the answer'}", flush=True)
            print("x" * 300_000, flush=True)
            parent.ready(threads=os.environ["OMP_NUM_THREADS"])
        case "stubborn":
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
            parent.ready()
        case "parental":
            grandchild = await asyncio.create_subprocess_exec("sleep", "600")
            parent.ready(grandchild=grandchild.pid)
        case "lead" | "deaf" as behaviour:
            await lead(payload, parent, drain, notices=behaviour == "lead")
        case "follow" | "cling" as behaviour:
            await follow(payload, parent, drain, clings=behaviour == "cling")
            return
        case "quit":
            parent.ready()
            os._exit(4)
        case _:
            parent.ready(address=str(payload.get("address", "")), name=str(payload.get("name", "")))
    await drain.wait()


async def lead(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event, notices: bool) -> None:
    """Ready once as many as payload["awaited"] have come to the door, with what they say of themselves; ends with
    MISSED when one of them is gone, if it notices. Takes payload["lingers"] seconds after it has let them go."""
    met: asyncio.Queue[str] = asyncio.Queue()
    lines: list[asyncio.StreamWriter] = []

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(writer)
        met.put_nowait((await reader.readline()).decode().strip())
        await reader.read()
        if notices and not drain.is_set():
            os._exit(MISSED)

    door = socket.socket(fileno=payload["door"])
    await asyncio.start_server(meet, sock=door)
    host, port = door.getsockname()
    followers: list[str] = []
    while len(followers) < payload["awaited"]:
        followers.append(await met.get())
        print(f"met {followers[-1]}", flush=True)
    parent.ready(door=f"{host}:{port}", followers=" ".join(followers))
    await drain.wait()
    for writer in lines:
        writer.close()
    await asyncio.sleep(payload.get("lingers", 0))


async def follow(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event, clings: bool) -> None:
    """Says its process id and address to its leader; ends with 0 when the leader hangs up, unless it clings."""
    host, _, port = payload["leader"].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{os.getpid()}@{payload.get('host', '')}\n".encode())
    parent.ready()
    await reader.read()
    print("let go", flush=True)
    if clings:
        await drain.wait()


if __name__ == "__main__":
    run_child(main)
