"""Logs are structured, complete, and silent about what users write."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from pdserve.telemetry.logs import configure_logs


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_line_has_fields_time_and_level() -> None:
    stream = io.StringIO()
    configure_logs(json=True, stream=stream)
    structlog.get_logger("pdserve.request").info("request", request_id="r-1", latency=0.5)
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["timestamp"].endswith("Z")
    del entry["timestamp"]
    assert entry == {
        "event": "request",
        "level": "info",
        "logger": "pdserve.request",
        "request_id": "r-1",
        "latency": 0.5,
    }


def test_libraries_log_in_the_same_form() -> None:
    stream = io.StringIO()
    configure_logs(json=True, stream=stream, level="warning")
    logging.getLogger("uvicorn.error").info("quiet")
    logging.getLogger("uvicorn.error").warning("port %d", 5)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "port 5"


@pytest.mark.parametrize("as_json", [True, False])
def test_private_fields_and_local_variables_stay_out(as_json: bool) -> None:
    stream = io.StringIO()
    configure_logs(json=as_json, stream=stream)
    log = structlog.get_logger("pdserve")
    private = "whi" + "sper"
    log.info("asked", prompt=private, messages=[private], authorization=private, status="ok")

    def fail(prompt: str) -> None:
        raise ValueError(f"{len(prompt)} characters")

    try:
        fail(private)
    except ValueError:
        log.exception("failed")
    assert "whisper" not in stream.getvalue()
    assert "7 characters" in stream.getvalue()
    assert "redacted" in stream.getvalue()
