"""What a pod without clients of its own answers to probes: GET /live while it runs, GET /ready while it is of use."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

READY = "ready"
STOP_GRACE = 1.0
"""Seconds for a probe's answer."""


def probes(status: Callable[[], str]) -> Starlette:
    """status: what it does now; READY makes it ready."""

    async def live(request: Request) -> JSONResponse:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> JSONResponse:
        now = status()
        return JSONResponse({"status": now}, status_code=200 if now == READY else 503)

    return Starlette(routes=[Route("/live", live), Route("/ready", ready)])
