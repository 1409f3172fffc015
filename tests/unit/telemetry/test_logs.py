"""Logs are structured, complete, and silent about what users write."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from pdserve.telemetry.logs import configure_logs
from pdserve.telemetry.request_log import log_request
from tests.unit.telemetry.records import disaggregated, replayed


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(stream: io.StringIO) -> str:
        configure_logs(json=False, stream=stream)
        structlog.get_logger("pdserve").info("ready")
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in line(Terminal())
    assert "\x1b[" not in line(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in line(Terminal())


def test_what_uvicorn_says_of_itself_is_for_debugging() -> None:
    quiet, chatty = io.StringIO(), io.StringIO()
    configure_logs(json=True, stream=quiet)
    logging.getLogger("uvicorn.error").info("Started server process")
    configure_logs(json=True, stream=chatty, level="debug")
    logging.getLogger("uvicorn.error").info("Started server process")
    assert (quiet.getvalue(), "Started" in chatty.getvalue()) == ("", True)


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


def test_a_request_ends_in_one_line_that_tells_its_way_and_its_times() -> None:
    stream = io.StringIO()
    configure_logs(json=True, stream=stream)
    log_request(disaggregated("cmpl-1", "mine"), 0.105, 0.046)
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["mode"], entry["prefill"], entry["decode"]) == ("disaggregated", "prefill-0", "decode-0")
    assert (entry["prompt_tokens"], entry["cached_tokens"], entry["output_tokens"]) == (64, 4, 12)
    assert (entry["prefill_seconds"], entry["transfer_seconds"], entry["handoff_gap"]) == (0.02, 0.019, 0.014)
    assert (entry["replays"], entry["transfer_backend"], entry["client_request_id"]) == (0, "shared_memory", "mine")
    log_request(replayed(), 0.105, None)
    entry = json.loads(stream.getvalue().splitlines()[1])
    assert (entry["replays"], entry["time_to_first_token"]) == (1, None)
