"""`pdserve status`: ask a running gateway for its engines."""

import json
import urllib.error
import urllib.request
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.core.errors import InvalidRequest, PdserveError, Unavailable

_TIMEOUT = 5.0


def fetch_engines(host: str, port: int, api_key: str | None) -> bytes:
    """The gateway's answer to GET /admin/engines, JSON. Raises a PdserveError that says what to do."""
    url = f"http://{host if ':' not in host else f'[{host}]'}:{port}/admin/engines"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            raise InvalidRequest(f"{url} wants an API key; give --api-key or set PDSERVE_API_KEY") from None
        raise PdserveError(f"{url} answered {error.code} {error.reason}; is this a pdserve gateway?") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(
            f"nothing answers at {url} ({reason}); start it with `pdserve serve` or give its --port"
        ) from None


def render(answer: bytes) -> str:
    """The engines as a table for a terminal. Raises PdserveError when the answer is not ours."""
    try:
        engines: list[dict[str, Any]] = json.loads(answer)["engines"]
        rows = [_row(engine) for engine in engines]
    except (ValueError, KeyError, TypeError):
        raise PdserveError("the answer is not a list of engines; is this a pdserve gateway?") from None
    table = Table(box=None, pad_edge=False)
    for title, right in _COLUMNS:
        table.add_column(title, justify="right" if right else "left")
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue().rstrip("\n")


_COLUMNS = (
    ("ENGINE", False),
    ("ROLE", False),
    ("STATE", False),
    ("PID", True),
    ("ADDRESS", False),
    ("RUNNING", True),
    ("WAITING", True),
    ("KV FREE", True),
    ("USED", True),
    ("LEASED", True),
    ("QUARANTINED", True),
    ("TOTAL", True),
)


def _row(engine: dict[str, Any]) -> list[str]:
    values = [engine[name] for name in ("id", "role", "state", "pid", "address", "running", "waiting")]
    blocks = engine["kv_blocks"]
    return [str(value) for value in (*values, *(blocks[n] for n in ("free", "used", "leased", "quarantined", "total")))]
