"""The HTTP application."""

from importlib.metadata import version

from fastapi import FastAPI

from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.chat import chat_router
from pdserve.gateway.http.chat_page import chat_page_router
from pdserve.gateway.http.completions import completions_router
from pdserve.gateway.http.errors import install
from pdserve.gateway.http.middleware import KeyCheck, RequestContext
from pdserve.gateway.http.operations import operations_router


def create_app(gateway: Gateway) -> FastAPI:
    """All routes of one gateway. OpenAPI is at /openapi.json; its viewers load scripts from elsewhere and are off."""
    app = FastAPI(title="pdserve", version=version("pdserve"), docs_url=None, redoc_url=None, redirect_slashes=False)
    install(app, gateway.metrics)
    app.include_router(chat_page_router())
    app.include_router(operations_router(gateway))
    app.include_router(chat_router(gateway))
    app.include_router(completions_router(gateway))
    app.add_middleware(KeyCheck, gateway=gateway)
    app.add_middleware(RequestContext, gateway=gateway)  # added last, so it runs first
    return app
