"""For operators: probes, metrics, the served model, and the engines behind it."""

from dataclasses import asdict

import orjson
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pdserve.core.cluster import EngineView
from pdserve.core.errors import Unavailable
from pdserve.gateway.gateway import Gateway
from pdserve.telemetry.metrics import CONTENT_TYPE

_NO_BLOCKS = {"total": 0, "free": 0, "used": 0, "leased": 0, "quarantined": 0}


def operations_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/live", response_model=None)
    async def live() -> Response:
        return _json({"status": "live"})

    @router.get("/ready", response_model=None)
    @router.get("/health", response_model=None)
    async def ready() -> Response:
        gateway.intake.check()
        if not gateway.ready:
            raise Unavailable("the engines are not ready yet")
        return _json({"status": "ready"})

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(gateway.metrics.exposition(), media_type=CONTENT_TYPE)

    @router.get("/admin/engines", response_model=None)
    async def engines() -> Response:
        return _json({"engines": [describe(view) for view in gateway.generator.engines()]})

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        return _json({"object": "list", "data": [_model(gateway)]})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        if not name:
            raise HTTPException(404)
        gateway.check_model(name)
        return _json(_model(gateway))

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


def _model(gateway: Gateway) -> dict[str, object]:
    return {
        "id": gateway.model.name,
        "object": "model",
        "created": int(gateway.started),
        "owned_by": "pdserve",
        "max_model_len": gateway.model.max_model_len,
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
