"""`pdserve drain`: have an engine emptied, and wait until it has ended."""

import json
import time
from typing import Any
from urllib.parse import quote

from pdserve.cli.admin import ask_admin
from pdserve.core.errors import PdserveError, Unavailable

_LOOK_EVERY = 0.5
_PATIENCE = 120.0
"""Seconds to wait for the end, beyond any sensible drain_timeout of an engine that has somewhere to move things."""


def drain(engine: str, host: str, port: int, api_key: str | None, *, stay: bool) -> str:
    """What became of it, in words. Raises a PdserveError that says what to do."""
    before = _look(engine, host, port, api_key)
    order(engine, "leave" if stay else "restart", host, port, api_key)
    begun = time.monotonic()
    while time.monotonic() < begun + _PATIENCE:
        time.sleep(_LOOK_EVERY)
        after = _look(engine, host, port, api_key)
        if after["epoch"] != before["epoch"] or after["state"] == "dead":
            return f"{engine} has ended after {time.monotonic() - begun:.1f} s; it " + (
                "stays away" if stay else "starts again"
            )
    raise Unavailable(f"{engine} still runs after {_PATIENCE:g} s; `pdserve status` shows what it holds")


def start(engine: str, host: str, port: int, api_key: str | None) -> str:
    """What became of it, in words. Raises a PdserveError that says what to do."""
    state = _look(engine, host, port, api_key)["state"]
    order(engine, "return", host, port, api_key)
    match state:
        case "dead":
            return f"{engine} starts"
        case "draining":
            return f"{engine} is draining; it starts again once it has ended"
    return f"{engine} runs already, it is {state}"


def order(engine: str, what: str, host: str, port: int, api_key: str | None) -> None:
    """Pass an order for an engine on. Raises a PdserveError when it is refused."""
    ask_admin(host, port, f"/admin/engines/{quote(engine, safe='')}/{what}", api_key, method="POST")


def _look(engine: str, host: str, port: int, api_key: str | None) -> dict[str, Any]:
    try:
        engines = json.loads(ask_admin(host, port, "/admin/engines", api_key))["engines"]
        known: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in engines}
    except (ValueError, KeyError, TypeError):
        raise PdserveError("the answer is not a list of engines; is this a pdserve gateway?") from None
    if engine not in known:
        raise PdserveError(f"there is no engine {engine!r}; there are {', '.join(known)}")
    return known[engine]
