"""From the configuration to the processes that should run, and what each of them is told."""

import json
from functools import partial
from typing import Any

from pdserve.cluster.launcher import LaunchSpec, Resources
from pdserve.cluster.supervisor import Desired
from pdserve.config.pools import PoolConfig
from pdserve.config.schema import Config, Device, to_wire
from pdserve.core.endpoint import Role

GATEWAY = "gateway"


def desired(config: Config, registry_address: str, owner: str = "", socket: str = "") -> list[Desired]:
    """Engines role by role, named "prefill-0", "prefill-1", …, then the gateway and its fronts; or, by `only`, one kind
    of them. owner: what the supervisor is called where it announces its engines. socket: as for desired_gateway."""
    engines = [] if config.only == "router" else _engines(config)
    if config.only == "engines":
        return engines
    return [*engines, *desired_gateway(config, registry_address, owner, socket)]


def desired_gateway(config: Config, registry_address: str, owner: str = "", socket: str = "") -> list[Desired]:
    """The gateway, which serves the engines the registry names, and with several workers the fronts, which meet it at
    the socket."""
    told = json.loads(to_wire(config))
    payload = {"config": told, "registry": registry_address, "owner": owner, "fronts": socket}
    gateway = LaunchSpec(name=GATEWAY, module="pdserve.launch.gateway", payload=payload)
    wanted = [Desired(id=GATEWAY, role=None, launch=partial(_same, gateway))]
    if not socket:
        return wanted
    payload = {"config": told, "gateway": socket}
    for number in range(config.workers):
        front = LaunchSpec(name=f"front-{number}", module="pdserve.launch.front", payload=payload)
        wanted.append(Desired(id=front.name, role=None, launch=partial(_same, front), ends_first=True))
    return wanted


def desired_engine(config: Config, engine_id: str, role: Role, host: str, port: int, gang_port: int) -> Desired:
    """One engine on this machine that listens on host:port; hosts of its ranks elsewhere, which others start, come to
    gang_port."""
    payload = _told(config, engine_id, role) | {"host": host, "port": port, "gang_port": gang_port}
    return Desired(id=engine_id, role=role, launch=partial(_engine_spec, payload, None, 1))


def _engines(config: Config) -> list[Desired]:
    return [
        engine(config, f"{config.engine_prefix}{role}-{index}", role)
        for role, pool in config.pools.by_role().items()
        for index in range(pool.engines)
    ]


def engine(config: Config, engine_id: str, role: Role) -> Desired:
    """An engine of a pool. Those of a pool that spans domains are spread over them by the number in their name."""
    pool = config.pools.by_role()[role]
    spec = partial(_engine_spec, _told(config, engine_id, role), _resources(pool, config.device), pool.hosts)
    return Desired(id=engine_id, role=role, launch=spec)


def _told(config: Config, engine_id: str, role: Role) -> dict[str, Any]:
    """What an engine is told: nothing that opens the gateway, or Redis."""
    public = json.loads(config.model_dump_json(exclude={"api_keys", "redis"}))
    number = engine_id.rpartition("-")[2]
    domain = config.pools.by_role()[role].domain_of(int(number) if number.isdecimal() else 0)
    return {"engine_id": engine_id, "role": role.value, "domain": domain, "config": public}


def unflippable(config: Config) -> str:
    """Why engines of this deployment cannot take the other role; empty when they can."""
    prefill, decode = config.pools.prefill, config.pools.decode
    for setting in ("tensor_parallel", "hosts", "prefix_caching", "depth"):
        if getattr(prefill, setting) != getattr(decode, setting):
            return f"engines cannot change roles while {setting} of pools.prefill and pools.decode differ"
    return ""


def _same(spec: LaunchSpec, _epoch: int) -> LaunchSpec:
    return spec


def _resources(pool: PoolConfig, device: Device) -> Resources:
    placement = pool.placement
    gpus = 0.0 if device is Device.CPU and placement.gpus is None else placement.gpus
    return Resources(cpus=pool.cpus, gpus=gpus, custom=placement.resources)


def _engine_spec(payload: dict[str, Any], resources: Resources | None, hosts: int, epoch: int) -> LaunchSpec:
    """hosts: machines the launcher is to spread the engine over."""
    name, threads = payload["engine_id"], payload["config"]["threads"]
    return LaunchSpec(
        name=name,
        module="pdserve.launch.engine",
        payload=payload | {"epoch": epoch},
        threads=threads,
        resources=resources,
        followers=tuple(
            LaunchSpec(
                name=f"{name}/{number}",
                module="pdserve.launch.rank_host",
                payload={"number": number, "config": payload["config"]},
                threads=threads,
            )
            for number in range(1, hosts)
        ),
    )
