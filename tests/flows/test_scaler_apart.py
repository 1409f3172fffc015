"""A gateway of `pdserve route` tells a scaler elsewhere of its load, passes its reasons on, and outlives it."""

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdserve.cluster.scaling import Scaling
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Role
from pdserve.rpc.channel import new_server
from pdserve.scaler.decision import Replicas
from tests.contract.processes import descendants, is_gone
from tests.deployment import SERVE, START_TIMEOUT, write_config

POOL: dict[str, Any] = {"min": 3, "max": 4, "forecast": {"kind": "none"}}


class Pools:
    """Two engines each, and what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Role, int]] = []

    def pools(self) -> Mapping[Role, Replicas]:
        return {role: Replicas(wanted=2, ready=2) for role in Role}

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        self.asked.append((role, engines))

    async def flip(self, engine_id: str, role: Role) -> None:
        raise AssertionError("no flip is enabled")


@pytest.mark.timeout(180)
async def test_a_gateway_reports_to_the_scaler_at_its_address(tmp_path: Path) -> None:
    policies = write_config(tmp_path / "policies.yaml", {"interval": 0.5, "pools": {"prefill": POOL, "decode": POOL}})
    cloud = Pools()
    scaling = Scaling(policies, cloud, SystemClock())
    server = new_server()
    scaling.register(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    port, admin_port, nowhere = free_ports(3)
    settings: dict[str, Any] = {
        "port": port,
        "grpc_port": 0,
        "admin_port": admin_port,
        "discovery": {"engines": [f"127.0.0.1:{nowhere}"]},
        "scaler": {"address": address},
    }
    command = [*SERVE[: SERVE.index("serve")], "route", str(write_config(tmp_path / "route.yaml", settings))]
    with (tmp_path / "route.log").open("wb") as log:
        gateway = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not cloud.asked:
                await asyncio.sleep(0.2)
                await scaling.look()
        assert cloud.asked == [(Role.PREFILL, 3), (Role.DECODE, 3)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_port}", timeout=10) as admin:
            told = (await admin.get("/admin/scaling")).json()
            assert [decision["what"] for decision in told["decisions"]] == [
                "prefill from 2 to 3 engines",
                "decode from 2 to 3 engines",
            ]
            async with asyncio.timeout(30):
                while "pdserve_scaler_decisions_total" not in (await admin.get("/metrics")).text:
                    await asyncio.sleep(0.2)
            await server.stop(None)
            gone = await admin.get("/admin/scaling")
            assert (gone.status_code, gone.json()["error"]["code"]) == (503, "unavailable")
            assert (await admin.get("/live")).status_code == 200
    finally:
        children = descendants(gateway.pid)
        gateway.terminate()
        async with asyncio.timeout(30):
            await gateway.wait()
        await server.stop(None)
    assert all(is_gone(pid, within=5) for pid in children)


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
