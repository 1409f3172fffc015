"""Request bodies: bounded in size and time, strict JSON."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

import orjson
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pdserve.core.errors import Cancelled, InvalidRequest
from pdserve.gateway.settings import GatewaySettings

Model = TypeVar("Model", bound=BaseModel)


class BodyRequest(Request):
    """Reads at most max_body_bytes within receive_timeout."""

    settings = GatewaySettings()

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            try:
                async with asyncio.timeout(self.settings.receive_timeout):
                    self._body = await self._read()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            except ClientDisconnect:
                raise Cancelled("the client is gone") from None
        return self._body

    async def _read(self) -> bytes:
        limit = self.settings.max_body_bytes
        too_large = HTTPException(413, f"the body is longer than {limit} bytes")
        length = self.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise too_large
        chunks, size = [], 0
        async for chunk in self.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise too_large
        return b"".join(chunks)


def route_class(settings: GatewaySettings) -> type[APIRoute]:
    """A route that takes JSON only, read by a BodyRequest with these settings, for endpoints `(request, body: Model)`.

    FastAPI documents such a route, but need not find out anew for each request what its endpoint takes."""
    request_class = type("BoundedRequest", (BodyRequest,), {"settings": settings})

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            endpoint, model = self.endpoint, get_type_hints(self.endpoint)["body"]

            async def handle(request: Request) -> Response:
                media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if media_type != "application/json":
                    raise InvalidRequest("send the body as `Content-Type: application/json`")
                bounded = request_class(request.scope, request.receive)
                response: Response = await endpoint(bounded, _validated(model, await bounded.body()))
                return response

            return handle

    return BodyRoute


def _validated(model: type[Model], body: bytes) -> Model:
    """Raises RequestValidationError. orjson refuses NaN, infinities, lone surrogates, invalid UTF-8 and nesting deeper
    than 1024."""
    try:
        return model.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from error
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in problems]) from error
