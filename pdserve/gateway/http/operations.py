"""For probes and clients: whether this server lives, is ready, and what it serves."""

import orjson
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pdserve.core.errors import Unavailable
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.intake import CLOSING


def probes_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/live", response_model=None)
    async def live() -> Response:
        return as_json({"status": "live", "admin_port": gateway.settings.admin_port})

    @router.get("/ready", response_model=None)
    @router.get("/health", response_model=None)
    async def ready() -> Response:
        if gateway.intake.leaving:
            raise Unavailable(CLOSING)
        if not gateway.ready:
            raise Unavailable("the engines are not ready yet")
        degraded = gateway.degraded()
        return as_json({"status": "ready"} | ({"degraded": list(degraded)} if degraded else {}))

    return router


def models_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        return as_json({"object": "list", "data": [_model(gateway)]})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        if not name:
            raise HTTPException(404)
        gateway.check_model(name)
        return as_json(_model(gateway))

    return router


def _model(gateway: Gateway) -> dict[str, object]:
    return {
        "id": gateway.model.name,
        "object": "model",
        "created": int(gateway.started),
        "owned_by": "pdserve",
        "max_model_len": gateway.model.max_model_len,
    }


def as_json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
