"""From sources to one checked configuration. Precedence: flags, environment, file, defaults."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from pdserve.config.checks import complaints
from pdserve.config.schema import Config
from pdserve.config.sources import ENVIRONMENT, Tree, from_environment, overlay, read_yaml
from pdserve.config.wording import plain
from pdserve.core.errors import ConfigError

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_ANY = re.compile(r"\[\d+\]")
"""A place in a list."""


def load_config(
    path: Path | None = None, *, env: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Config:
    """The effective configuration.

    flags maps dotted settings ("pools.prefill.engines") to values; None means not given. Raises
    ConfigError whose message lists every problem, one per line, with its path in the file.
    """
    from_env = from_environment(env or {})
    from_flags = {name: value for name, value in (flags or {}).items() if value is not None}
    tree = overlay(overlay(read_yaml(path) if path else {}, from_env), from_flags)
    variables = {setting: name for name, setting in ENVIRONMENT.items()}
    origins = {setting: f" (from the variable {variables[setting]})" for setting in from_env}
    origins |= dict.fromkeys(from_flags, " (from the command line)")
    config = _with_key_file(_validate(tree, path, origins))
    problems = complaints(config)
    if problems:
        raise ConfigError(_report(path, problems))
    return config


def _validate(tree: Tree, path: Path | None, origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        problems = sorted({_problem(detail, origins) for detail in error.errors()})
        raise ConfigError(_report(path, problems)) from None


def _with_key_file(config: Config) -> Config:
    """Keys of api_keys_file appended to api_keys, so that nobody reads the file twice."""
    if config.api_keys_file is None:
        return config
    file = Path(config.api_keys_file)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file: cannot read {file}: {error}") from error
    keys = tuple(SecretStr(line) for line in lines if line and not line.startswith("#"))
    if not keys or any(len(key.get_secret_value()) < 8 for key in keys):
        raise ConfigError(f"api_keys_file: {file} must hold keys of at least 8 characters, one per line")
    return config.model_copy(update={"api_keys": (*config.api_keys, *keys), "api_keys_file": None})


def _report(path: Path | None, problems: list[str]) -> str:
    where = f"{path}: " if path else ""
    noun = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{where}{noun} in the configuration\n" + "\n".join(f"  {problem}" for problem in problems)


def _problem(detail: ErrorDetails, origins: Mapping[str, str]) -> str:
    dotted = _dotted(detail)
    if detail["type"] in _UNKNOWN:
        return f"{dotted}: unknown key{_suggestion(dotted)}"
    message = plain(detail["msg"])
    shown = (
        "" if "keys" in dotted or dotted == "redis.url" else f", not {json.dumps(detail['input'], default=str)[:80]}"
    )
    return f"{dotted}{origins.get(dotted, '')}: {message}{shown}"


def _dotted(detail: ErrorDetails) -> str:
    """The path in the file; pydantic's loc also holds the tried alternatives of a union, which are none."""
    sections = {name[:end] for name in setting_names() for end, char in enumerate(name + ".") if char == "."}
    sections |= {name.removesuffix("[]") for name in sections}
    dotted = ""
    for part in detail["loc"]:
        deeper = f"{dotted}[{part}]" if isinstance(part, int) else f"{dotted}.{part}".lstrip(".")
        if isinstance(part, int) or _ANY.sub("[]", deeper) in sections or detail["type"] in _UNKNOWN:
            dotted = deeper
    return dotted


def _suggestion(dotted: str) -> str:
    """Nearest valid name beside the unknown one, or a place elsewhere where the name is known."""
    parent, dot, name = _ANY.sub("[]", dotted).rpartition(".")
    names = setting_names()
    beside = sorted({n.removeprefix(parent + dot).split(".")[0] for n in names if n.startswith(parent + dot)})
    if close := difflib.get_close_matches(name, beside, n=1):
        return f'; did you mean "{close[0]}"?'
    if elsewhere := [n for n in names if n.rpartition(".")[2] == name]:
        return f"; it belongs at {' or '.join(elsewhere)}"
    return f"; valid here: {', '.join(beside)}"


def setting_names() -> list[str]:
    """Dotted names of all settings, in the order of the schema; `[]` stands for any place in a list of sections."""
    return list(_names(Config))


def _names(section: type[Any], prefix: str = "") -> Iterator[str]:
    annotations: dict[str, Any]
    if is_dataclass(section):
        annotations = {field.name: field.type for field in fields(section)}
    else:
        annotations = {name: info.annotation for name, info in section.model_fields.items()}
    for name, annotation in annotations.items():
        if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
            yield from _names(annotation, f"{prefix}{name}.")
        elif (listed := _listed_section(annotation)) is not None:
            yield from _names(listed, f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}"


def _listed_section(annotation: Any) -> type[BaseModel] | None:
    """The section of which a setting is a list."""
    items = get_args(annotation)[:1] if get_origin(annotation) is tuple else ()
    return next((item for item in items if isinstance(item, type) and issubclass(item, BaseModel)), None)
