"""A front's process: `python -m pdserve.launch.front`, started by the supervisor beside the gateway's."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pdserve.config.schema import Config, from_wire
from pdserve.core.clock import SystemClock
from pdserve.core.tasks import running
from pdserve.gateway.fronts.claims import RemoteClaims
from pdserve.gateway.fronts.remote import GatewayLine
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.app import create_probe_app
from pdserve.gateway.serve import bind, serve_http
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.launch.child import Parent, run_child
from pdserve.launch.edge import (
    STOP_GRACE,
    ClientPorts,
    leave,
    model_info,
    open_traces,
    settings,
    spare_garbage_collection,
)
from pdserve.launch.ports import local_address
from pdserve.telemetry.logs import configure_logs
from pdserve.telemetry.totals import Growth

_LOOPBACK = "127.0.0.1"


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    """Serve clients on ports shared with other fronts until told to drain, then finish what runs."""
    config = from_wire(json.dumps(payload["config"]))
    configure_logs(json=config.log.format == "json", level=config.log.level)
    line = GatewayLine(payload["gateway"], lambda: growth())
    gateway = _gateway(config, line)
    growth = Growth(gateway.metrics.registry)
    async with running(line.run()):
        await line.heard()
        await _serve(config, gateway, parent, drain)
        await gateway.keyed.close()
        await line.close()


async def _serve(config: Config, gateway: Gateway, parent: Parent, drain: asyncio.Event) -> None:
    traces = open_traces(config.telemetry.otlp_endpoint, gateway)
    clients = ClientPorts.open(gateway, config, shared=True)
    probes = bind(_LOOPBACK, 0)
    leaving, stop = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.serve(leaving, stop))
        group.create_task(serve_http(create_probe_app(gateway), probes, stop, STOP_GRACE))
        sending = group.create_task(traces.run()) if traces else None
        spare_garbage_collection()
        parent.ready(address=clients.address, probe=local_address(_LOOPBACK, probes.getsockname()[1]))
        await drain.wait()
        await leave(gateway.intake, config, leaving)
        stop.set()
        if sending:
            sending.cancel()


def _gateway(config: Config, line: GatewayLine) -> Gateway:
    gateway = Gateway(
        line,
        Tokenizer.load(config.model_path),
        model_info(config),
        replace(settings(config), requests_kept=1),  # the gateway keeps them
        clock=SystemClock(),
        claims=RemoteClaims(line),
        degraded=line.degraded,
        elsewhere=line,
    )
    gateway.tell_ends(line.tell_end)
    if config.telemetry.vllm_names:
        gateway.metrics.name_as_vllm(config.model_name, line.engines)
    return gateway


if __name__ == "__main__":
    run_child(main)
