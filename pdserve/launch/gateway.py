"""The gateway's process: `python -m pdserve.launch.gateway`, started by the supervisor."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import structlog

from pdserve.cluster.registry import order_engine, watch_endpoints
from pdserve.cluster.scaling import REPORT_EVERY, explain_scaling, report_demand
from pdserve.config.clients import TenantConfig
from pdserve.config.schema import Config, from_wire
from pdserve.core.admission import TenantRules
from pdserve.core.clock import Clock, SystemClock
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import PdserveError
from pdserve.core.tasks import end
from pdserve.dispatch.dispatcher import Dispatcher
from pdserve.dispatch.migration import MigrationRules
from pdserve.dispatch.replay import ReplayRules
from pdserve.dispatch.sessions import SessionPool
from pdserve.gateway.fronts.hub import FrontHub
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.hashing import PromptHasher
from pdserve.gateway.http.app import create_admin_app
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
from pdserve.launch.routers import (
    KnownEngines,
    Publish,
    exchange_bookings,
    open_link,
    shared_claims,
    shared_counters,
)
from pdserve.router.admission import AdmissionRules
from pdserve.router.kv_index import KVIndex
from pdserve.router.loading import load_policy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from pdserve.scaler.demand import Demand, bounded, one_after_another
from pdserve.telemetry.engine_watch import EngineWatch
from pdserve.telemetry.index_metrics import IndexSizes
from pdserve.telemetry.logs import configure_logs
from pdserve.telemetry.scaler_metrics import ScalerFigures

if TYPE_CHECKING:
    from pdserve.shared.link import RedisLink

_log = structlog.get_logger(__name__)


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    """Serve the registry's engines until told to drain, then finish what runs: to clients, or to fronts that speak with
    them."""
    config = from_wire(json.dumps(payload["config"]))
    configure_logs(json=config.log.format == "json", level=config.log.level)
    clock = SystemClock()
    link = open_link(config, clock)
    sessions = SessionPool(config.times, clock, index=KVIndex(max_blocks=config.routing.index_blocks))
    routes = router(config, sessions)
    dispatcher = _dispatcher(config, sessions, routes, clock, link)
    gateway = _gateway(config, payload["registry"], dispatcher, PromptHasher(routes), clock, link)
    engines = KnownEngines(_introduce(gateway, sessions))
    if link:
        others = exchange_bookings(config, link, sessions, clock)
        gateway.metrics.routers.watch(lambda: link.up, lambda: others.num_known)
        if owner := payload["owner"]:
            engines.follow(link, owner, clock, config.times.shared_lease)
    traces = None if payload["fronts"] else open_traces(config.telemetry.otlp_endpoint, gateway)
    hub = FrontHub(gateway, routes, sessions) if payload["fronts"] else None
    clients = None if hub else ClientPorts.open(gateway, config)
    admin_listener = bind(config.admin_host, config.admin_port or 0)
    leaving, stop = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        background = [group.create_task(_follow(payload["registry"], engines))]
        shared = [group.create_task(link.run())] if link else []
        if clients:
            group.create_task(clients.serve(leaving, stop))
        if hub:
            await hub.listen(payload["fronts"])
            background.append(group.create_task(hub.run()))
        group.create_task(serve_http(create_admin_app(gateway), admin_listener, stop, STOP_GRACE))
        if scaler := scaler_address(config, payload["registry"]):
            background.append(group.create_task(_report_demand(scaler, dispatcher, gateway)))
        if traces:
            background.append(group.create_task(traces.run()))
        spare_garbage_collection()
        if clients:
            parent.ready(address=clients.address)
        else:  # at the clients' address a front would answer
            admin_address = local_address(config.admin_host, admin_listener.getsockname()[1])
            parent.ready(address=local_address(config.host, config.port), probe=admin_address)
        await drain.wait()
        if hub:  # fronts have ended before, and what they asked for
            gateway.intake.draining = True
            hub.tell_state()
        await leave(gateway.intake, config, leaving)
        stop.set()
        for task in background:
            task.cancel()
        await end(shared)
    await gateway.keyed.close()
    if hub:
        await hub.close()
    await sessions.close()
    if link:
        await link.close()


def _dispatcher(
    config: Config, sessions: SessionPool, routes: Router, clock: Clock, link: "RedisLink | None"
) -> Dispatcher:
    return Dispatcher(
        sessions,
        routes,
        clock,
        ReplayRules(**config.replay.model_dump()),
        MigrationRules(deadline=config.times.migration),
        AdmissionRules(**config.slo.model_dump(), **config.admission.model_dump()),
        {tenant.name: tenant_rules(tenant) for tenant in config.tenants},
        shared_counters(config, link) if link else None,
    )


def _gateway(
    config: Config,
    registry: str,
    dispatcher: Dispatcher,
    hasher: PromptHasher,
    clock: Clock,
    link: "RedisLink | None",
) -> Gateway:
    scaler = scaler_address(config, registry)
    gateway = Gateway(
        dispatcher,
        Tokenizer.load(config.model_path),
        model_info(config),
        settings(config),
        clock=clock,
        order_engine=partial(order_engine, registry),
        move_request=dispatcher.move,
        waiting=dispatcher.waiting,
        claims=shared_claims(config, link) if link else None,
        degraded=lambda: ("redis",) if link and not link.up else (),
        explain_scaling=partial(explain_scaling, scaler) if scaler else None,
        prepare=hasher,
    )
    if config.telemetry.vllm_names:
        gateway.metrics.name_as_vllm(config.model_name, gateway.generator.engines)
    return gateway


def scaler_address(config: Config, registry: str) -> str:
    """Whom this gateway tells of its load: a scaler of its own, or its supervisor's; empty where there is none."""
    return config.scaler.address or (registry if config.policies else "")


def _introduce(gateway: Gateway, sessions: SessionPool) -> Publish:
    """A function that tells sessions and metrics which engines there are."""
    watch = EngineWatch(gateway.metrics)
    gateway.metrics.watch_index(partial(_index_sizes, sessions.index))
    sessions.on_draining.append(lambda: watch.draining(sessions.state().engines))

    def introduce(endpoints: tuple[Endpoint, ...]) -> None:
        sessions.update(endpoints)
        watch.update(endpoints)

    return introduce


def router(config: Config, sessions: SessionPool) -> Router:
    """Raises ConfigError when the configured policy cannot be had."""
    rules = RoutingRules(**config.routing.model_dump(exclude={"policy", "index_blocks"}))
    return Router(load_policy(config.routing.policy, rules), sessions.index, rules)


def _index_sizes(index: KVIndex) -> IndexSizes:
    return IndexSizes(len(index), index.num_expected, index.num_forgotten)


def tenant_rules(tenant: TenantConfig) -> TenantRules:
    """What admission must know of a tenant."""
    return TenantRules(
        weight=tenant.weight,
        requests_per_second=tenant.requests_per_second,
        burst=tenant.burst or ceil(tenant.requests_per_second or 1),
        concurrent_requests=tenant.concurrent_requests,
    )


async def _follow(registry: str, engines: KnownEngines) -> None:
    async with aclosing(watch_endpoints(registry)) as sets:
        async for endpoints in sets:
            engines.update(endpoints)


async def _report_demand(scaler: str, dispatcher: Dispatcher, gateway: Gateway) -> None:
    """Tell the scaler of this gateway's load, and do what it asks. Without an answer its last word holds."""
    name = gateway.new_id()
    figures: ScalerFigures | None = None
    gateway.metrics.watch_scaler(lambda: figures)
    unheard: Demand | None = None
    while True:
        await gateway.clock.sleep(REPORT_EVERY)
        demand = one_after_another(filter(None, (unheard, dispatcher.demand())))
        assert demand
        try:
            orders, figures = await report_demand(scaler, name, demand)
        except PdserveError as error:
            if unheard is None:
                _log.warning("the scaler is not reached, its last word holds", cause=str(error))
            unheard = bounded(demand)
            continue
        unheard = None
        dispatcher.obey(orders)


if __name__ == "__main__":
    run_child(main)
