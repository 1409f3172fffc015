"""A child that behaves as its payload says; run by tests/contract/test_launchers.py and the supervisor's tests."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from pdserve.core.errors import CheckpointError
from pdserve.launch.child import Parent, run_child


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    match payload["behaviour"]:
        case "refuse":
            raise CheckpointError("no config.json in /nowhere")
        case "crash":
            print("something is wrong", file=sys.stderr)
            os._exit(3)
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
        case _:
            parent.ready(address=str(payload.get("address", "")), name=str(payload.get("name", "")))
    await drain.wait()


if __name__ == "__main__":
    run_child(main)
