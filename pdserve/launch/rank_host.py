"""The process that starts some of an engine's ranks on another machine: `python -m pdserve.launch.rank_host`, started
by a launcher together with the engine's own."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from pdserve.config.schema import from_wire
from pdserve.core.errors import Unavailable
from pdserve.launch.addresses import own_address
from pdserve.launch.child import Parent, run_child
from pdserve.telemetry.logs import configure_logs
from pdserve.worker.rank_host import RankHost


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    """Serve the engine at the payload's `leader` until it has left, which drains first if it is told to.
    Raises Unavailable when the engine cannot be reached, or will not have this host."""
    config = from_wire(json.dumps(payload["config"]))
    configure_logs(json=config.log.format == "json", level=config.log.level)
    host = own_address(config.engine_network, payload.get("host"))
    leader = payload["leader"]
    try:
        await RankHost(leader, payload["number"], host).serve(on_start=parent.ready)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"cannot reach the engine at {leader}: {error}") from error


if __name__ == "__main__":
    run_child(main)
