"""Rules that span several settings. Pure: a configuration in, complaints out."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from typing import get_args

from pdserve.config.clients import TenantConfig
from pdserve.config.schema import Config, Device, Launcher, TransferBackendName, WorkerMode
from pdserve.config.times import Times
from pdserve.core.admission import DEFAULT_TENANT


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to host; an unknown name counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def complaints(config: Config) -> list[str]:
    """One line per broken rule, each naming the setting and what to do; empty when all is well."""
    return [
        *_exposure(config),
        *_tenants(config.tenants),
        *_ports(config),
        *_routers(config),
        *_pools(config),
        *_scale_targets(config),
        *_placement(config),
        *_memory(config),
        *_tiers(config),
        *_times(config.times),
    ]


def _exposure(config: Config) -> Iterator[str]:
    """host is that of HTTP and gRPC, admin_host that of the admin port: none is open to others without keys. Tenants'
    keys open the former only."""
    for setting, keyed in (("host", config.api_keys or config.tenants), ("admin_host", config.api_keys)):
        host = getattr(config, setting)
        if not is_loopback(host) and not keyed:
            yield (
                f"{setting}: {host} can be reached from other machines, and no api_keys are set; "
                "set api_keys or api_keys_file, or bind 127.0.0.1"
            )


def _tenants(tenants: Sequence[TenantConfig]) -> Iterator[str]:
    names: set[str] = set()
    keys: dict[str, int] = {}
    for place, tenant in enumerate(tenants):
        if tenant.name == DEFAULT_TENANT:
            yield f"tenants[{place}].name: {DEFAULT_TENANT} are the clients of api_keys; choose another name"
        if tenant.name in names:
            yield f"tenants[{place}].name: there is another tenant {tenant.name}; give each its own name"
        names.add(tenant.name)
        if not tenant.keys:
            yield f"tenants[{place}].keys: without a key nobody is {tenant.name}; make one with `pdserve keys new`"
        for key in tenant.keys:
            if keys.setdefault(key, place) != place:
                yield f"tenants[{place}].keys: {key[:15]}… is a key of {tenants[keys[key]].name} too; give each its own"
        if tenant.burst is not None and tenant.requests_per_second is None:
            yield f"tenants[{place}].burst: goes with requests_per_second only; give both, or neither"


def _ports(config: Config) -> Iterator[str]:
    if config.port == config.grpc_port != 0:
        yield f"grpc_port: {config.grpc_port} is also the HTTP port; choose two different ports"
    if config.admin_port and config.admin_port in (config.port, config.grpc_port):
        other = "HTTP" if config.admin_port == config.port else "gRPC"
        yield f"admin_port: {config.admin_port} is also the {other} port; choose two different ports"


def _routers(config: Config) -> Iterator[str]:
    if config.only is not None and config.redis.url is None:
        yield f"only: a deployment of {config.only} alone meets the others through Redis; set redis.url"


def _pools(config: Config) -> Iterator[str]:
    pools = config.pools
    counts = (pools.prefill.engines, pools.decode.engines, pools.unified.engines)
    if counts[2] and (counts[0] or counts[1]):
        yield "pools.unified.engines: unified engines stand alone; set engines of prefill and decode to 0"
    elif not counts[2] and not (counts[0] and counts[1]):
        yield (
            f"pools: {counts[0]} prefill and {counts[1]} decode engines cannot serve; "
            "set at least 1 of each, or only pools.unified.engines"
        )
    for role, pool in pools.by_role().items():
        if pool.max_rows > pool.max_tokens_per_step:
            yield (
                f"pools.{role}.max_rows: {pool.max_rows} rows cannot each have a token in a step of "
                f"max_tokens_per_step {pool.max_tokens_per_step}; lower max_rows or raise max_tokens_per_step"
            )
        if pool.tensor_parallel % pool.hosts:
            yield (
                f"pools.{role}.hosts: {pool.tensor_parallel} ranks of tensor_parallel cannot be spread evenly over "
                f"{pool.hosts} hosts; choose a divisor"
            )
        if pool.tensor_parallel > 1:
            yield from _several_ranks(config, f"pools.{role}.tensor_parallel")
    if pools.prefill.engines and not pools.decode.accepts_handoff:
        yield "pools.decode.accepts_handoff: must be true while there are prefill engines"


def _several_ranks(config: Config, setting: str) -> Iterator[str]:
    if config.device is Device.CUDA:
        yield f"{setting}: several ranks compute together on cpu only; set device to cpu, or this to 1"
    if config.worker is WorkerMode.INPROC:
        yield f"{setting}: each rank needs a process of its own; set worker to auto or process"


def _scale_targets(config: Config) -> Iterator[str]:
    """Only of a LeaderWorkerSet an engine is several pods; elsewhere pods and Ray nodes count as one engine each."""
    named = {"prefill": config.scaler.kubernetes.prefill, "decode": config.scaler.kubernetes.decode}
    for role, pool in config.pools.by_role().items():
        target = named.get(role) or ""
        if pool.hosts > 1 and target and not target.startswith("LeaderWorkerSet/"):
            yield (
                f"scaler.kubernetes.{role}: {target} has a pod for each engine, and pools.{role}.hosts is "
                f"{pool.hosts}; name a LeaderWorkerSet, or set hosts to 1"
            )


def _placement(config: Config) -> Iterator[str]:
    own = config.launcher is Launcher.RAY and config.ray.address is None
    if own and config.ray.auth_token_file is not None:
        yield "ray.auth_token_file: a cluster of our own makes its token; give ray.address, or leave this out"
    if config.ray.node_ip is not None and config.ray.node_ip in ("127.0.0.1", "localhost"):
        yield f"ray.node_ip: Ray cannot be reached at {config.ray.node_ip}; use 127.0.0.2 or this machine's own"
    for role, pool in config.pools.by_role().items():
        gpus = pool.placement.gpus
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            yield f"pools.{role}.placement.gpus: {gpus:g} is neither a part of one GPU nor a number of GPUs"
        if own and pool.engines and pool.placement.resources:
            names = ", ".join(pool.placement.resources)
            yield f"pools.{role}.placement.resources: {names} is offered by no node of our own; give ray.address"


def _memory(config: Config) -> Iterator[str]:
    kv = config.kv
    if not kv.backends:
        yield f"kv.backends: name at least one of {', '.join(get_args(TransferBackendName))}"
    if kv.num_blocks is not None and kv.memory is not None:
        yield "kv.memory: give either kv.num_blocks or kv.memory, not both"
    if kv.num_blocks is not None and kv.num_blocks * kv.block_size < config.max_model_len:
        yield (
            f"kv.num_blocks: {kv.num_blocks} blocks of {kv.block_size} tokens do not hold one request of "
            f"max_model_len {config.max_model_len}; raise kv.num_blocks or lower max_model_len"
        )


def _tiers(config: Config) -> Iterator[str]:
    host, disk = config.kv.tiers.host, config.kv.tiers.disk
    if (disk.path is None) != (disk.size is None):
        yield "kv.tiers.disk: give both path and size, or neither"
    if host is None and disk.path is not None:
        yield "kv.tiers.host: must be given with kv.tiers.disk: what goes to disk comes from there"
    if disk.path is not None and not Path(disk.path).is_absolute():
        yield (
            f"kv.tiers.disk.path: {disk.path} depends on the folder each engine happens to run in; "
            "give it from the root on"
        )
    for role, pool in config.pools.by_role().items():
        if host is not None and pool.engines and not pool.prefix_caching:
            yield f"pools.{role}.prefix_caching: must be true with kv.tiers: tiers hold what the prefix cache knows"


def _times(times: Times) -> Iterator[str]:
    for field in fields(times):
        if getattr(times, field.name) <= 0:
            yield f"times.{field.name}: must be greater than 0"
    for early, late, why in (
        ("heartbeat", "suspect", "one late heartbeat is no suspicion"),
        ("suspect", "fence", "an engine is suspected before it is killed"),
        ("fence", "quarantine", "the end of a frozen peer ends what it held up"),
        ("lease_guard", "lease", "a lease must leave time for a pull"),
        ("heartbeat", "lease", "heartbeats renew leases"),
        ("heartbeat", "shared_lease", "heartbeats renew it"),
        ("link_backoff", "link_backoff_max", "the delay grows up to its maximum"),
        ("link_backoff_max", "link_forgotten", "a link is asked for as often as the delay allows"),
        ("restart_backoff", "restart_backoff_max", "the delay grows up to its maximum"),
    ):
        if getattr(times, early) >= getattr(times, late):
            yield f"times.{early}: must be less than times.{late} ({getattr(times, late):g}): {why}"
    if 3 * times.kubernetes_answer > times.scaler_lease:
        yield (
            f"times.kubernetes_answer: must be at most a third of times.scaler_lease ({times.scaler_lease:g}): what a "
            "leader has begun ends before another may act"
        )
    if not times.scaler_lease.is_integer():
        yield f"times.scaler_lease: {times.scaler_lease:g} is no whole number of seconds, which a Lease counts in"
