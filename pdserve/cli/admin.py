"""Asking a running gateway's admin port."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException

from pdserve.core.errors import InvalidRequest, PdserveError, Unavailable

_TIMEOUT = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without proxies: the gateway is on this machine or near it."""


def ask_admin(
    host: str, port: int, path: str, api_key: str | None, *, method: str = "GET", timeout: float = _TIMEOUT
) -> bytes:
    """The answer to a request for path on the admin port of the gateway that listens on port, JSON.

    Any of the gateway's HTTP ports will do: GET /live there names the admin port. Raises a PdserveError
    that says what to do."""
    base = f"http://{host if ':' not in host else f'[{host}]'}"
    try:
        admin_port = json.loads(_get(f"{base}:{port}/live", api_key))["admin_port"]
    except (ValueError, KeyError, TypeError):
        raise _stranger(f"{base}:{port}/live") from None
    if not isinstance(admin_port, int):
        raise Unavailable(f"the gateway at {base}:{port} has no admin port")
    return _get(f"{base}:{admin_port}{path}", api_key, method, timeout)


def _get(url: str, api_key: str | None, method: str = "GET", timeout: float = _TIMEOUT) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers, method=method), timeout=timeout) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        raise _refusal(url, error) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(
            f"nothing answers at {url} ({reason}); start it with `pdserve serve` or give its --port; "
            "ask for a gateway elsewhere on its own machine, or set its admin_host"
        ) from None
    except HTTPException:
        raise _stranger(url) from None


def _refusal(url: str, error: urllib.error.HTTPError) -> PdserveError:
    with error:
        body = error.read()
    if error.code == 401:
        return InvalidRequest(f"{url} wants an API key; give --api-key or set PDSERVE_API_KEY")
    try:
        return PdserveError(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _stranger(url)


def _stranger(url: str) -> PdserveError:
    return PdserveError(f"{url} does not answer as expected; is this a pdserve gateway?")
