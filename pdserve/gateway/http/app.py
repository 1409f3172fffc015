"""The HTTP applications: one for clients, one for operators."""

from collections.abc import Callable, Iterable
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from pdserve.gateway.auth import Authenticator
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.admin import admin_router
from pdserve.gateway.http.chat import chat_router
from pdserve.gateway.http.chat_page import chat_page_router
from pdserve.gateway.http.completions import completions_router
from pdserve.gateway.http.errors import install
from pdserve.gateway.http.middleware import KeyCheck, OriginCheck, RequestContext
from pdserve.gateway.http.operations import models_router, probes_router
from pdserve.gateway.http.orders import orders_router


def create_app(gateway: Gateway) -> FastAPI:
    """The public routes. OpenAPI is at /openapi.json; its viewers load scripts from elsewhere and are off."""
    routers = (  # looked through in this order
        chat_router(gateway),
        completions_router(gateway),
        models_router(gateway),
        probes_router(gateway),
        chat_page_router(),
    )
    return _app("pdserve", gateway, gateway.authenticator, routers)


def create_admin_app(gateway: Gateway) -> FastAPI:
    """What operators ask, and clients of the API need not see; probes too, so that any port tells who is there."""
    routers = (probes_router(gateway), admin_router(gateway), orders_router(gateway))
    return _app("pdserve admin", gateway, gateway.operators, routers, OriginCheck)


def create_probe_app(gateway: Gateway) -> FastAPI:
    """Probes alone, for a process that shares its ports with others."""
    return _app("pdserve probes", gateway, gateway.operators, (probes_router(gateway),))


def _app(
    title: str,
    gateway: Gateway,
    authenticator: Authenticator,
    routers: Iterable[APIRouter],
    *checks: Callable[[ASGIApp], ASGIApp],
) -> FastAPI:
    """checks see requests that may enter, before any route."""
    app = FastAPI(
        title=title,
        version=version("pdserve"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # It would see bodies, which nobody else may, and look for exporters at each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    install(app, gateway.metrics)
    for router in routers:
        app.include_router(router)
    for check in checks:
        app.add_middleware(check)
    app.add_middleware(KeyCheck, gateway=gateway, authenticator=authenticator)
    app.add_middleware(RequestContext, gateway=gateway)  # added last, so it runs first
    return app
