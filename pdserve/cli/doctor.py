"""`pdserve doctor`: every pair of engines of a running deployment, checked one after another."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any
from urllib.parse import quote

import msgspec
from rich.console import Console
from rich.table import Table

from pdserve.cli.admin import ask_admin
from pdserve.cli.diagnosis import Finding, Level, diagnose
from pdserve.config.times import Times
from pdserve.core.errors import PdserveError
from pdserve.core.pair_check import PairCheck

_ANSWER_GRACE = 5.0
"""Seconds beyond the gateway's own limit for a check."""
_WIDTH = 140
_COLUMNS = (
    ("SOURCE", False),
    ("TARGET", False),
    ("BACKEND", False),
    ("TRANSPORT", False),
    ("ROUND TRIP", True),
    ("ONE BLOCK", True),
    ("GB/S BY SIZE", False),
    ("VERDICT", False),
)


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found. absent says which engines could not be asked, and why."""

    checks: tuple[PairCheck, ...]
    findings: tuple[tuple[Finding, ...], ...]
    """Of the check at the same place."""
    absent: tuple[str, ...]

    @property
    def passed(self) -> bool:
        bad = any(finding.level is Level.FAILURE for of_check in self.findings for finding in of_check)
        return not bad and not self.absent


def examine(host: str, port: int, api_key: str | None) -> Examination:
    """Ask the gateway for its engines, then for a check of every pair. Raises PdserveError when it cannot be asked."""
    engines = _engines(ask_admin(host, port, "/admin/engines", api_key))
    ready = [engine for engine in engines if engine["state"] == "ready"]
    absent = tuple(f"{engine['id']} is {engine['state']}" for engine in engines if engine["state"] != "ready")
    checks = []
    for source, target in _pairs(ready):
        path = f"/admin/pairs/{quote(source, safe='')}/{quote(target, safe='')}/check"
        answer = ask_admin(host, port, path, api_key, method="POST", timeout=Times().pair_check + _ANSWER_GRACE)
        checks.append(_check(answer))
    return Examination(tuple(checks), tuple(tuple(diagnose(check)) for check in checks), absent)


def render(examination: Examination) -> str:
    """For a terminal: a table, then what to do."""
    table = Table(box=None, pad_edge=False)
    for title, right in _COLUMNS:
        table.add_column(title, justify="right" if right else "left")
    advice: list[str] = []
    for check, findings in zip(examination.checks, examination.findings, strict=True):
        table.add_row(*_row(check, findings))
        for finding in findings:
            advice += [
                "",
                f"{finding.level.upper()} {check.source} → {check.target}: {finding.what}",
                f"  {finding.advice}",
            ]
    for engine in examination.absent:
        advice += ["", f"FAILURE {engine}: it cannot be checked", "  see its log, and `pdserve status`"]
    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    shown = text.getvalue().rstrip("\n") if examination.checks else "no pair of a prefill and a decode engine to check"
    return "\n".join([shown, *advice])


def to_json(examination: Examination) -> str:
    """For programs."""
    pairs = [
        msgspec.to_builtins(check) | {"findings": msgspec.to_builtins(findings)}
        for check, findings in zip(examination.checks, examination.findings, strict=True)
    ]
    return json.dumps({"passed": examination.passed, "absent": examination.absent, "pairs": pairs}, indent=1)


def _engines(answer: bytes) -> list[dict[str, Any]]:
    try:
        engines: list[dict[str, Any]] = json.loads(answer)["engines"]
        if all({"id", "role", "state"} <= engine.keys() for engine in engines):
            return engines
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PdserveError("the answer is not a list of engines; is this a pdserve gateway?")


def _pairs(engines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    by_role: dict[str, list[str]] = {"prefill": [], "decode": []}
    for engine in engines:
        by_role.setdefault(engine["role"], []).append(engine["id"])
    return [(source, target) for source in by_role["prefill"] for target in by_role["decode"]]


def _check(answer: bytes) -> PairCheck:
    try:
        return msgspec.json.decode(answer, type=PairCheck)
    except msgspec.MsgspecError:
        raise PdserveError("the answer is not the check of a pair; is the gateway of this version?") from None


def _row(check: PairCheck, findings: Sequence[Finding]) -> list[str]:
    worst = findings[0].level.value if findings else "good"
    speeds = "  ".join(f"{_size(size.num_bytes)} {size.num_bytes / size.seconds / 1e9:.2f}" for size in check.sizes)
    one_block = _ms(check.sizes[0].seconds) if check.sizes else "–"
    trip = _ms(check.round_trip) if check.round_trip is not None else "–"
    transport = check.transport.value if check.sizes else "–"
    return [check.source, check.target, check.backend or "–", transport, trip, one_block, speeds or "–", worst]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
