"""Public request traces as one sequence of arrivals and lengths.

| format | arrival | lengths | prefixes |
|---|---|---|---|
| mooncake | `timestamp`, ms | `input_length`, `output_length` | `hash_ids`, one per 512 tokens |
| bailian | `timestamp`, s | the same | `hash_ids`, one per 16 tokens; known by its `chat_id` |
| azure | `TIMESTAMP`, date and time | `ContextTokens`, `GeneratedTokens` | none |
| csv | `timestamp_s` | `input_length`, `output_length` | none |

Files may be gzipped. Equal hash ids at equal places mean equal prompt prefixes.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from pdserve_loadgen.errors import UsageError

MOONCAKE_BLOCK = 512
BAILIAN_BLOCK = 16
_STAMP = re.compile(r"(.{19})(?:\.(\d+))?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEntry:
    """One request of a trace. at: seconds after the trace's first. hash_ids name block_tokens tokens each."""

    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How a trace is fitted to a system: faster, fewer, shorter.

    length_scale multiplies input lengths and block sizes, so that shared prefixes stay the same share;
    the caps then cut. Output lengths are multiplied as well.
    """

    speed: float = 1.0
    limit: int | None = None
    length_scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None


def read_trace(path: Path, scaling: Scaling | None = None) -> list[TraceEntry]:
    """The trace in order of arrival, first at 0. Raises UsageError naming the line that cannot be read."""
    scaling = scaling or Scaling()
    try:
        entries = sorted(_read(path), key=lambda entry: entry.at)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error):
        raise UsageError(f"{path} is neither text nor gzipped text") from None
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror or error}") from None
    if not entries:
        raise UsageError(f"the trace {path} has no requests")
    return list(scale(entries, scaling))


def scale(entries: Iterable[TraceEntry], scaling: Scaling) -> Iterator[TraceEntry]:
    """Entries as a run wants them; the first arrives at 0. Entries must be in order of arrival."""
    start: float | None = None
    for entry in islice(entries, scaling.limit):
        start = entry.at if start is None else start
        input_tokens = _scaled(entry.input_tokens, scaling.length_scale, scaling.max_input)
        block_tokens = max(1, round(entry.block_tokens * scaling.length_scale))
        yield replace(
            entry,
            at=(entry.at - start) / scaling.speed,
            input_tokens=input_tokens,
            output_tokens=_scaled(entry.output_tokens, scaling.length_scale, scaling.max_output),
            hash_ids=entry.hash_ids[: ceil(input_tokens / block_tokens)],
            block_tokens=block_tokens,
        )


def _scaled(tokens: int, factor: float, cap: int | None) -> int:
    scaled = max(1, round(tokens * factor))
    return scaled if cap is None else min(scaled, cap)


def _read(path: Path) -> Iterator[TraceEntry]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        if path.name.removesuffix(".gz").endswith(".csv"):
            rows: Iterable[tuple[int, Mapping[str, Any]]] = enumerate(csv.DictReader(lines), start=2)
        else:
            rows = _json_lines(path, lines)
        for number, row in rows:
            try:
                yield _entry(row)
            except (KeyError, TypeError, ValueError):
                raise UsageError(f"{path}, line {number}: not a Mooncake, Bailian, Azure or length row") from None


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError:
            raise UsageError(f"{path}, line {number}: not JSON") from None


def _entry(row: Mapping[str, Any]) -> TraceEntry:
    """Raises KeyError, TypeError or ValueError for a row of no known format."""
    if "TIMESTAMP" in row:
        return _lengths(_seconds(row["TIMESTAMP"]), row["ContextTokens"], row["GeneratedTokens"])
    if "timestamp_s" in row:
        return _lengths(float(row["timestamp_s"]), row["input_length"], row["output_length"])
    is_bailian = "chat_id" in row
    at = float(row["timestamp"]) / (1 if is_bailian else 1000)
    return replace(
        _lengths(at, row["input_length"], row["output_length"]),
        hash_ids=tuple(int(hash_id) for hash_id in row.get("hash_ids", ())),
        block_tokens=BAILIAN_BLOCK if is_bailian else MOONCAKE_BLOCK,
    )


def _lengths(at: float, input_tokens: Any, output_tokens: Any) -> TraceEntry:
    return TraceEntry(at=at, input_tokens=int(input_tokens), output_tokens=int(output_tokens))


def _seconds(text: str) -> float:
    """`2023-11-16 18:15:46.6805900`, seven decimals as .NET writes them, or `2024-05-10 00:00:00.009930+00:00`; UTC
    where no zone is given, so that no clock change is between."""
    found = _STAMP.fullmatch(text)
    if found is None:
        raise ValueError(f"no time: {text[:50]!r}")
    whole, fraction, zone = found.groups()
    return datetime.fromisoformat(whole + (zone or "+00:00")).timestamp() + float(f"0.{fraction or 0}")
