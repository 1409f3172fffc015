"""Structured logs on stderr: one JSON object per line, or coloured text for people.

What users write and what they authenticate with never reaches a log: fields of those names are replaced.
Lines of libraries that use the standard library's logging come out in the same form.
"""

import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TextIO

import structlog

_PRIVATE = frozenset(
    {"prompt", "prompt_token_ids", "messages", "content", "text", "token_ids", "api_key", "authorization", "headers"}
)


def configure_logs(*, json: bool, level: str = "info", stream: TextIO | None = None) -> None:
    """Set up logging for this process; called once, by its entry point. Colours only where a person looks."""
    stream = stream or sys.stderr
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact,
    ]
    final: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if json:
        final += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Plain tracebacks: the fancy ones print local variables, and those hold prompts.
        final += [
            structlog.dev.ConsoleRenderer(colors=_colours(stream), exception_formatter=structlog.dev.plain_traceback)
        ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # "Started server process" and the like, which our own lines say better.
    logging.getLogger("uvicorn").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


@contextmanager
def only_errors() -> Iterator[None]:
    """Within, nothing below an error is logged: what simulated processes complain of is part of the simulation."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield
    finally:
        structlog.configure(**before)


def _colours(stream: TextIO) -> bool:
    """As https://no-color.org asks."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the values of private fields."""
    for name in _PRIVATE & event.keys():
        event[name] = "[redacted]"
    return event
