"""From the configuration to the processes that should run, and what each of them is told."""

import json
from functools import partial
from typing import Any

from pdserve.cluster.launcher import LaunchSpec, Resources
from pdserve.cluster.supervisor import Desired
from pdserve.config.schema import Config, Device, PoolConfig, to_wire

GATEWAY = "gateway"


def desired(config: Config, registry_address: str) -> list[Desired]:
    """Engines role by role, named "prefill-0", "prefill-1", …, then the gateway."""
    public: dict[str, Any] = json.loads(config.model_dump_json(exclude={"api_keys"}))
    engines = [
        Desired(
            id=f"{role}-{index}",
            role=role,
            launch=partial(
                _engine_spec,
                {"engine_id": f"{role}-{index}", "role": role.value, "domain": pool.domain_of(index), "config": public},
                _resources(pool, config.device),
            ),
        )
        for role, pool in config.pools.by_role().items()
        for index in range(pool.engines)
    ]
    payload = {"config": json.loads(to_wire(config)), "registry": registry_address}
    gateway = LaunchSpec(name=GATEWAY, module="pdserve.launch.gateway", payload=payload)
    return [*engines, Desired(id=GATEWAY, role=None, launch=lambda _epoch: gateway)]


def _resources(pool: PoolConfig, device: Device) -> Resources:
    placement = pool.placement
    gpus = 0.0 if device is Device.CPU and placement.gpus is None else placement.gpus
    return Resources(cpus=pool.cpus, gpus=gpus, custom=placement.resources)


def _engine_spec(payload: dict[str, Any], resources: Resources, epoch: int) -> LaunchSpec:
    return LaunchSpec(
        name=payload["engine_id"],
        module="pdserve.launch.engine",
        payload=payload | {"epoch": epoch},
        threads=payload["config"]["threads"],
        resources=resources,
    )
