"""GET /: a page on which people talk to the model and see which engines answered."""

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def chat_page_router() -> APIRouter:
    router = APIRouter()
    html = files("pdserve.gateway.http").joinpath("chat.html").read_bytes()

    @router.get("/", response_model=None, include_in_schema=False)
    async def chat_page() -> Response:
        return Response(html, headers=_HEADERS, media_type="text/html")

    return router
