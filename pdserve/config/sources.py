"""Where settings come from: a YAML file, the environment, command-line flags."""

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pdserve.core.errors import ConfigError

MAX_CONFIG_BYTES = 1024 * 1024
MAX_DEPTH = 16
ENVIRONMENT = {
    "PORT": "port",
    "GRPC_PORT": "grpc_port",
    "ADMIN_PORT": "admin_port",
    "PDSERVE_REDIS_URL": "redis.url",
}

Tree = dict[str, Any]
"""Nested settings as YAML gives them; keys are strings at every level."""
Lines = dict[tuple[str | int, ...], int]
"""Path of a setting, places in lists included → its line in the file, from 1."""


class _Loader(yaml.SafeLoader):
    """Plain data only; duplicate keys are refused, because the first would silently lose."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="keys must be plain names", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f'duplicate key "{key_node.value}"; keep one', problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> Tree:
    """The settings in a file. Raises ConfigError naming file, line and column."""
    return _parse(_read(path), path)


def read_marked_yaml(path: Path) -> tuple[Tree, Lines]:
    """The same, and where each setting is."""
    data = _read(path)
    tree = _parse(data, path)
    return tree, dict(_lines(yaml.compose(data, Loader=_Loader)))


def _parse(data: bytes, path: Path) -> Tree:
    try:
        _refuse_bombs(data, path)
        tree = yaml.load(data, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f'{path}: expected settings such as "port: 8000", found a {type(tree).__name__}')
    return tree


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes; this does not look like a configuration")
    return data


def _lines(node: yaml.Node | None, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield (*path, place), item.start_mark.line + 1
            yield from _lines(item, (*path, place))


def _refuse_bombs(data: bytes, path: Path) -> None:
    """Aliases let a small file expand without bound, deep nesting takes the parser quadratic time."""
    depth = 0
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else "?"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}:{line}: aliases (*{event.anchor}) are not supported; repeat the value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path}:{line}: nested deeper than {MAX_DEPTH} levels; no setting lies that deep")


def from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """Dotted setting → value for the variables that are set and not empty."""
    found = {setting: env[name] for name, setting in ENVIRONMENT.items() if env.get(name)}
    return {setting: int(text) if text.isdecimal() else text for setting, text in found.items()}


def overlay(tree: Tree, settings: Mapping[str, Any]) -> Tree:
    """tree with dotted settings put in place; None means not given. Sections are copied, not changed."""
    merged = dict(tree)
    for dotted, value in settings.items():
        if value is None:
            continue
        head, _, rest = dotted.partition(".")
        if not rest:
            merged[head] = value
            continue
        section = merged.get(head)
        merged[head] = overlay(section if isinstance(section, dict) else {}, {rest: value})
    return merged
