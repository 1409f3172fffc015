"""What operators want done, on the admin port: engines emptied and started, requests moved."""

from fastapi import APIRouter
from starlette.responses import Response

from pdserve.cluster.registry import EngineOrder
from pdserve.core.errors import Unavailable
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.operations import as_json


def orders_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.post("/admin/engines/{engine}/{order}", response_model=None)
    async def order(engine: str, order: EngineOrder) -> Response:
        if gateway.order_engine is None:
            raise Unavailable("this gateway's engines have no supervisor")
        await gateway.order_engine(engine, order)
        return as_json({"engine": engine, "order": order.value})

    @router.post("/admin/requests/{name:path}/move", response_model=None)
    async def move(name: str) -> Response:
        if gateway.move_request is None:
            raise Unavailable("this gateway's requests cannot move")
        record = gateway.ring.find(name)
        await gateway.move_request(record.request_id if record else name)
        return as_json({"request": name})

    return router
