"""For operators, on a port of their own: metrics, the engines behind the gateway, and what became of requests."""

from dataclasses import asdict
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from starlette.responses import Response

from pdserve.core.cluster import EngineView
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.errors import envelope, error_response
from pdserve.gateway.http.operations import as_json
from pdserve.rpc.pair_check import check_pair
from pdserve.telemetry.explain import explain
from pdserve.telemetry.metrics import CONTENT_TYPE

_NO_BLOCKS = {"total": 0, "free": 0, "used": 0, "leased": 0, "quarantined": 0}


def admin_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(await gateway.exposition(), media_type=CONTENT_TYPE)

    @router.get("/admin/engines", response_model=None)
    async def engines() -> Response:
        return as_json({"engines": [describe(view) for view in gateway.generator.engines()]})

    @router.get("/admin/links", response_model=None)
    async def links() -> Response:
        return as_json({"engines": [describe_links(view) for view in gateway.generator.engines()]})

    @router.get("/admin/steps", response_model=None)
    async def steps() -> Response:
        return as_json({"engines": [describe_steps(view) for view in gateway.generator.engines()]})

    @router.get("/admin/requests", response_model=None)
    async def requests(latest: Annotated[int, Query(ge=1)] = 20) -> Response:
        return as_json({"requests": [explain(record) for record in gateway.ring.latest(latest)]})

    @router.get("/admin/scaling", response_model=None)
    async def scaling() -> Response:
        if gateway.explain_scaling is None:
            nothing = "pools stay as they are: this deployment has no scaling policy"
            return error_response(404, envelope(404, nothing, "not_found"))
        return Response(await gateway.explain_scaling(), media_type="application/json")

    @router.post("/admin/pairs/{source}/{target}/check", response_model=None)
    async def check(source: str, target: str) -> Response:
        known = {view.endpoint.engine_id: view.endpoint for view in gateway.generator.engines()}
        unknown = next((name for name in (source, target) if name not in known), None)
        if unknown is not None:
            return error_response(404, envelope(404, f"there is no engine {unknown[:200]!r}", "not_found"))
        found = await check_pair(known[source], known[target], gateway.settings.pair_check_timeout)
        return as_json(msgspec.to_builtins(found))

    @router.get("/admin/requests/{name:path}", response_model=None)
    async def request(name: str) -> Response:
        record = gateway.ring.find(name)
        if record is None:
            kept = (
                f"the latest {gateway.settings.requests_kept} requests are kept, and {name[:200]!r} is not among them"
            )
            return error_response(404, envelope(404, kept, "not_found"))
        return as_json(explain(record))

    return router


def describe(view: EngineView) -> dict[str, object]:
    """An engine and its load, zeros before its first report. The epoch is a decimal string: 64 bits do not fit
    into a JSON number."""
    endpoint, load = view.endpoint, view.load
    return {
        "id": endpoint.engine_id,
        "role": endpoint.role.value,
        "epoch": str(endpoint.epoch),
        "pid": endpoint.pid,
        "address": endpoint.address,
        "state": endpoint.state.value,
        "running": load.running if load else 0,
        "waiting": load.waiting if load else 0,
        "kv_blocks": asdict(load.blocks) if load else _NO_BLOCKS,
    }


def describe_links(view: EngineView) -> dict[str, object]:
    """The prefill engines an engine is not sent to now, because its link to them was lost."""
    return {"id": view.endpoint.engine_id, "lost": sorted(engine_id for engine_id, _ in view.lost_links)}


def describe_steps(view: EngineView) -> dict[str, object]:
    """What an engine's steps have taken since it started, as in EngineCapacity and LoadSnapshot, and what the router
    makes of it."""
    return {
        "id": view.endpoint.engine_id,
        "role": view.endpoint.role.value,
        "capacity": asdict(view.capacity) if view.capacity else None,
        "steps": [asdict(tally) for tally in view.load.steps] if view.load else [],
        "model": asdict(view.step_model),
    }
