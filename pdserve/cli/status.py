"""`pdserve status`: the engines of a running gateway, for people."""

import json
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.core.errors import PdserveError


def render(engines: bytes, links: bytes) -> str:
    """What GET /admin/engines and /admin/links answered as a table for a terminal. Raises PdserveError when that is
    not ours."""
    try:
        lost = {engine["id"]: engine["lost"] for engine in json.loads(links)["engines"]}
        rows = [_row(engine, lost.get(engine["id"], [])) for engine in json.loads(engines)["engines"]]
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
    ("LOST LINKS", False),
)


def _row(engine: dict[str, Any], lost: list[str]) -> list[str]:
    values = [engine[name] for name in ("id", "role", "state", "pid", "address", "running", "waiting")]
    blocks = engine["kv_blocks"]
    values += [blocks[name] for name in ("free", "used", "leased", "quarantined", "total")]
    return [*map(str, values), ", ".join(lost)]
