"""How a model wants to be sampled when the client does not say: its generation_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.core.request import SamplingParams

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_sampling_defaults(directory: Path) -> Mapping[str, float]:
    """SamplingParams fields the model's makers recommend; empty without the file, or if it says not to sample.

    Raises CheckpointError when a value is out of range.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    try:
        content: Any = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("do_sample") is False:
        return {}
    defaults = {name: content[name] for name in _NAMES if isinstance(content.get(name), int | float)}
    try:
        SamplingParams(**defaults)
    except InvalidRequest as error:
        raise CheckpointError(f"{path}: {error}") from error
    return defaults
