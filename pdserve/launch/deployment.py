"""From the configuration to the processes that should run, and what each of them is told."""

import json
from functools import partial
from typing import Any

from pdserve.cluster.launcher import LaunchSpec, Resources
from pdserve.cluster.supervisor import Desired
from pdserve.config.schema import Config, Device, PoolConfig, to_wire
from pdserve.core.endpoint import Role

GATEWAY = "gateway"


def desired(config: Config, registry_address: str) -> list[Desired]:
    """Engines role by role, named "prefill-0", "prefill-1", …, then the gateway."""
    engines = [
        engine(config, f"{role}-{index}", role)
        for role, pool in config.pools.by_role().items()
        for index in range(pool.engines)
    ]
    payload = {"config": json.loads(to_wire(config)), "registry": registry_address}
    gateway = LaunchSpec(name=GATEWAY, module="pdserve.launch.gateway", payload=payload)
    return [*engines, Desired(id=GATEWAY, role=None, launch=lambda _epoch: gateway)]


def engine(config: Config, engine_id: str, role: Role) -> Desired:
    """An engine of a pool."""
    public: dict[str, Any] = json.loads(config.model_dump_json(exclude={"api_keys"}))
    resources = _resources(config.pools.by_role()[role], config.device)
    return Desired(id=engine_id, role=role, launch=partial(_engine_spec, engine_id, role, public, resources))


def unflippable(config: Config) -> str:
    """Why engines of this deployment cannot take the other role; empty when they can."""
    prefill, decode = config.pools.prefill, config.pools.decode
    for setting in ("tensor_parallel", "prefix_caching", "depth"):
        if getattr(prefill, setting) != getattr(decode, setting):
            return f"engines cannot change roles while {setting} of pools.prefill and pools.decode differ"
    return ""


def _resources(pool: PoolConfig, device: Device) -> Resources:
    placement = pool.placement
    gpus = 0.0 if device is Device.CPU and placement.gpus is None else placement.gpus
    return Resources(cpus=pool.cpus, gpus=gpus, custom=placement.resources)


def _engine_spec(engine_id: str, role: Role, config: dict[str, Any], resources: Resources, epoch: int) -> LaunchSpec:
    return LaunchSpec(
        name=engine_id,
        module="pdserve.launch.engine",
        payload={"engine_id": engine_id, "role": role.value, "epoch": epoch, "config": config},
        threads=config["threads"],
        resources=resources,
    )
