"""From a file to a checked policy, or to complaints with line, path and reason."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pdserve.config.sources import Lines, read_marked_yaml
from pdserve.config.wording import plain
from pdserve.core.errors import ConfigError
from pdserve.scaler.checks import complaints
from pdserve.scaler.policy import Policy

Place = tuple[str | int, ...]


def load_policy(path: Path) -> Policy:
    """Raises ConfigError whose message lists every problem, one per line: line of the file, field, reason."""
    tree, lines = read_marked_yaml(path)
    try:
        policy = Policy.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise _refusal(path, [_problem(detail, lines) for detail in error.errors()]) from None
    problems = [(_line(_split(field), lines), f"{field}: {why}") for field, why in complaints(policy)]
    if problems:
        raise _refusal(path, problems)
    return policy


def _refusal(path: Path, problems: Sequence[tuple[int, str]]) -> ConfigError:
    noun = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"  line {line}: {text}" for line, text in sorted(set(problems)))
    return ConfigError(f"{path}: {noun} in the policy\n{listed}")


def _problem(detail: ErrorDetails, lines: Lines) -> tuple[int, str]:
    place = tuple(detail["loc"])
    field = _dotted(place)
    if detail["type"] == "extra_forbidden":
        return _line(place, lines), f"{field}: unknown key{_suggestion(place)}"
    if detail["type"] == "missing":
        return _line(place, lines), f"{field}: must be given"
    value = json.dumps(detail["input"], default=str)[:80]
    return _line(place, lines), f"{field}: {plain(detail['msg'])}, not {value}"


def _line(place: Place, lines: Lines) -> int:
    """Of the field, or of what it should be in."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def _suggestion(place: Place) -> str:
    names = _names_beside(place)
    close = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; valid here: {', '.join(names)}"


def _names_beside(place: Place) -> list[str]:
    section: Any = Policy
    for part in place[:-1]:
        if not isinstance(part, int):
            section = _section(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section(annotation: Any) -> Any:
    """The section an annotation is, may be, or is a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def _dotted(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.lstrip(".") or "the file"


def _split(field: str) -> Place:
    parts = field.replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts)
