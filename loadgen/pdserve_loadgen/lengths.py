"""Distributions of lengths in tokens, drawn with the caller's random generator.

| spelled | means |
|---|---|
| `512` or `constant:512` | always 512 |
| `uniform:100:2000` | each length from 100 to 2000 equally likely |
| `lognormal:500:0.8` or `lognormal:500:0.8:4000` | median 500, sigma of the logarithm 0.8; at most 4000 |
| `empirical:FILE.csv:COLUMN` | a row's value, each row equally likely; the file may be gzipped |
"""

import csv
import gzip
from dataclasses import dataclass
from math import log
from pathlib import Path
from random import Random
from typing import Protocol

from pdserve_loadgen.errors import UsageError


class Lengths(Protocol):
    """Draws lengths of at least 1 token."""

    def draw(self, rng: Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Constant:
    tokens: int

    def draw(self, rng: Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Both ends included."""

    low: int
    high: int

    def draw(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Longer draws than `cap` become `cap`."""

    median: float
    sigma: float
    cap: int | None = None

    def draw(self, rng: Random) -> int:
        drawn = max(1, round(rng.lognormvariate(log(self.median), self.sigma)))
        return drawn if self.cap is None else min(drawn, self.cap)


@dataclass(frozen=True, slots=True)
class Empirical:
    values: tuple[int, ...]

    def draw(self, rng: Random) -> int:
        return rng.choice(self.values)


def parse_lengths(text: str) -> Lengths:
    """Raises UsageError for what the table above does not know."""
    kind, _, rest = text.partition(":")
    try:
        if kind.isdecimal() and not rest:
            return Constant(_tokens(kind))
        if kind == "constant":
            return Constant(_tokens(rest))
        if kind == "uniform":
            low, high = (_tokens(part) for part in rest.split(":"))
            return Uniform(low, _at_least(low, high))
        if kind == "lognormal":
            return _lognormal(*rest.split(":"))
        if kind == "empirical":
            path, _, column = rest.rpartition(":")
            return Empirical(_column(Path(path), column))
    except (ValueError, TypeError):
        raise UsageError(f"the lengths {text!r} are out of range or incomplete{_HINT}") from None
    raise UsageError(f"lengths of the kind {kind!r} are not known{_HINT}")


_HINT = "; write 512, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:CAP] or empirical:FILE.csv:COLUMN"


def _lognormal(median: str, sigma: str, cap: str | None = None) -> Lognormal:
    spread = float(sigma)
    if not 0 <= spread < 10:
        raise ValueError
    return Lognormal(float(_tokens(median)), spread, _tokens(cap) if cap is not None else None)


def _column(path: Path, column: str) -> tuple[int, ...]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            values = tuple(int(row[column]) for row in csv.DictReader(lines))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except KeyError:
        raise UsageError(f"{path} has no column {column!r}") from None
    if not values or min(values) < 1:
        raise UsageError(f"{path}: column {column!r} must hold lengths of at least 1 token")
    return values


def _tokens(text: str) -> int:
    return _at_least(1, int(text))


def _at_least(least: int, value: int) -> int:
    if value < least:
        raise ValueError
    return value
