"""What happens to every HTTP request before any route: an id, the key, and a net for defects."""

import re

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.core.errors import PdserveError
from pdserve.gateway.auth import ANYONE, Authenticator
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.errors import envelope, error_response, internal_error_body
from pdserve.gateway.protocol import MAX_HEADER_BYTES, TOO_LARGE

log = structlog.get_logger("pdserve.gateway")

OPEN_PATHS = frozenset({"/", "/live", "/ready", "/health", "/metrics"})
"""Need no API key: probes, scrapers and the chat page, which has the user type one."""

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestContext:
    """Gives a request its ids, returns them as `x-request-id`, turns an escaped exception into a 500, and has clients
    of a gateway that will end come by another connection next time.

    scope["state"] gets `id` (ours, unique), `client_id` (the client's x-request-id, else ours) and `arrived`
    (Unix seconds).
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own_id = self._gateway.new_id()
        given = Headers(scope=scope).get("x-request-id", "")
        client_id = given if _CLIENT_ID.fullmatch(given) else own_id
        scope.setdefault("state", {}).update(id=own_id, client_id=client_id, arrived=self._gateway.clock.unix())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = client_id
                if self._gateway.intake.leaving:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unexpected error", path=scope["path"], request_id=own_id)
            if started:
                raise
            self._gateway.metrics.rejections.labels(PdserveError.code).inc()
            await error_response(500, internal_error_body())(scope, receive, send_with_id)


class KeyCheck:
    """Lets only those past whom the authenticator knows, on every path that is not listed as open."""

    def __init__(self, app: ASGIApp, gateway: Gateway, authenticator: Authenticator) -> None:
        self._app = app
        self._gateway = gateway
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            body = envelope(431, TOO_LARGE, "too_large")
            await error_response(431, body)(scope, receive, send)
            return
        identity = self._authenticator.identify(Headers(scope=scope).get("authorization"))
        scope["state"]["identity"] = identity
        if identity is None and scope["path"] not in OPEN_PATHS:
            self._gateway.metrics.rejections.labels("invalid_api_key").inc()
            body = envelope(401, "send a valid API key as `Authorization: Bearer KEY`", "invalid_api_key")
            await error_response(401, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)


class OriginCheck:
    """Refuses orders that come from a web page, which browsers name in `Origin`, unless they bring a key: where none is
    asked for, any page that somebody on a trusted machine looks at could give some."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_order_of_a_page(scope):
            body = envelope(403, "orders are not taken from web pages unless the gateway has API keys", "forbidden")
            await error_response(403, body)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_order_of_a_page(scope: Scope) -> bool:
    keyless = scope["state"]["identity"] is ANYONE
    return keyless and scope["method"] not in _READING and "origin" in Headers(scope=scope)
