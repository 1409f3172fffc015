"""What cannot work is said as itself, whatever else runs meanwhile: command lines and supervisors look for it."""

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pdserve.cluster.launcher import Launched, LaunchSpec
from pdserve.config.schema import Config, DiscoveryConfig, to_wire
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError
from pdserve.launch import gateway, lone_engine, route
from pdserve.launch.child import Parent

PLACE = lone_engine.EnginePlace(name="p", role=Role.PREFILL, host="127.0.0.1", port=0, probe_port=0, gang_port=0)
CONFIG = Config(port=0, grpc_port=0, admin_port=0, discovery=DiscoveryConfig(engines=("127.0.0.1:9",)))


class Refusing:
    """A launcher whose processes refuse their input."""

    def __init__(self, **_: object) -> None:
        pass

    async def launch(self, spec: LaunchSpec) -> Launched:
        raise ConfigError("kv.memory is too small")


@pytest.mark.parametrize(
    ("module", "run"),
    [(lone_engine, lambda: lone_engine._run(CONFIG, PLACE)), (route, lambda: route._route(CONFIG, "revision"))],
    ids=["engine", "route"],
)
async def test_of_a_child(
    monkeypatch: pytest.MonkeyPatch, module: object, run: Callable[[], Coroutine[Any, Any, int]]
) -> None:
    monkeypatch.setattr(module, "ProcessLauncher", Refusing)
    with pytest.raises(ConfigError, match=r"kv\.memory is too small"):
        await run()


async def test_of_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("telemetry.otlp_endpoint needs a package")

    monkeypatch.setattr(gateway, "open_traces", refuse)
    payload = {"config": json.loads(to_wire(CONFIG)), "registry": "127.0.0.1:9", "owner": "", "fronts": ""}
    read, write = os.pipe()
    try:
        with pytest.raises(ConfigError, match="needs a package"):
            await gateway.main(payload, Parent(write), asyncio.Event())
    finally:
        os.close(read)
        os.close(write)
