"""One engine's process: `python -m pdserve.launch.engine`, started by a launcher."""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdserve.config.schema import Config, WorkerMode, from_wire
from pdserve.core import failpoints
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.engine.engine import Engine
from pdserve.engine.pair_checker import PairChecker
from pdserve.engine.server import EngineServer, grpc_links
from pdserve.launch.addresses import own_address
from pdserve.launch.child import Parent, run_child
from pdserve.launch.device import find_device
from pdserve.launch.door import open_rank_door
from pdserve.launch.sizing import worker_mode, worker_spec
from pdserve.telemetry.logs import configure_logs
from pdserve.worker.service import WorkerHandle, open_worker

DOMAIN_ENVIRONMENT = "PDSERVE_DOMAIN"
"""Names the fast network of the machine an engine runs on; comes before what the configuration says."""
_STOP_GRACE = 0.2
"""Seconds the server waits for streams that have nothing left to carry."""


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    """Open the worker, serve until told to drain, drain. Raises EngineDied when the engine is lost."""
    config = from_wire(json.dumps(payload["config"]))
    host = own_address(config.engine_network, payload.get("host"))
    configure_logs(json=config.log.format == "json", level=config.log.level)
    if folder := os.environ.get(failpoints.ENVIRONMENT):
        failpoints.arm(Path(folder), payload["engine_id"])
    device = find_device(config.device)
    pool = config.pools.by_role()[Role(payload["role"])]
    ranks = pool.tensor_parallel
    spec = replace(worker_spec(config, payload["engine_id"], payload["epoch"], device, ranks), host=host)
    mode = worker_mode(config.worker, device, ranks)
    door = await open_rank_door(payload, spec, pool.hosts)
    worker = await open_worker(spec, "process" if mode is WorkerMode.PROCESS else "inproc", config.times, door)
    try:
        await _serve(payload, config, host, worker, parent, drain)
    finally:
        await worker.close()


async def _serve(
    payload: Mapping[str, Any], config: Config, host: str, worker: WorkerHandle, parent: Parent, drain: asyncio.Event
) -> None:
    role = Role(payload["role"])
    max_model_len = min(config.max_model_len, worker.info.max_model_len)
    server = EngineServer(host, payload.get("port", 0))
    clock = SystemClock()
    engine = Engine(
        endpoint=Endpoint(
            engine_id=payload["engine_id"],
            role=role,
            epoch=payload["epoch"],
            address=server.address,
            pid=os.getpid(),
            state=EngineState.READY,
        ),
        info=replace(worker.info, name=config.model_name, max_model_len=max_model_len),
        limits=config.pools.by_role()[role].limits(max_model_len),
        executor=worker.executor,
        transfer=worker.transfer,
        open_link=grpc_links(worker.transfer, config.times, clock),
        times=config.times,
        clock=clock,
        tiers=worker.tiers,
        quarantine_limit=config.kv.quarantine_limit,
        domain=os.environ.get(DOMAIN_ENVIRONMENT) or payload.get("domain", ""),
    )
    checker = PairChecker(engine, worker.transfer, config.times)
    async with engine:
        pools = config.pools.by_role()
        roles = {other: pools[other].limits(max_model_len) for other in (Role.PREFILL, Role.DECODE)}
        await server.start(engine, config.times, checker, roles if role in roles else None)
        try:
            parent.ready(address=server.address)
            await _until_drained(engine, worker, drain, config.times.drain_timeout)
        finally:
            await server.stop(_STOP_GRACE)
            await checker.close()


async def _until_drained(engine: Engine, worker: WorkerHandle, drain: asyncio.Event, timeout: float) -> None:
    """Whether it was told to drain or has to. An idle engine learns here of its worker's death, a busy one from its
    step."""
    asked, overrun = asyncio.create_task(drain.wait()), asyncio.create_task(engine.overrun())
    deaths = {asyncio.ensure_future(death) for death in (engine.death(), worker.death())}
    try:
        done, _ = await asyncio.wait({asked, overrun, *deaths}, return_when=asyncio.FIRST_COMPLETED)
        for death in deaths & done:
            raise death.result()
        await engine.drain(timeout, cause="quarantine" if overrun in done else "")
    finally:
        for task in (asked, overrun, *deaths):
            task.cancel()


if __name__ == "__main__":
    run_child(main)
