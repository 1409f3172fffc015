"""From options to an exit code: the effects around a run."""

import asyncio
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from pdserve_loadgen.arrivals import Arrivals
from pdserve_loadgen.endpoint import Api
from pdserve_loadgen.errors import LoadgenError
from pdserve_loadgen.render import render
from pdserve_loadgen.run import run, write_json, write_record
from pdserve_loadgen.settings import Settings

PASSED, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def execute(options: dict[str, Any], json_file: Path | None, record: Path | None) -> int:
    """Runs, prints the report to stdout and everything else to stderr; returns the exit code."""
    settings = Settings(**{**options, "api": Api(options["api"]), "arrivals": Arrivals(options["arrivals"])})
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            outcome = loop.run(run(settings, Console(stderr=True)))
        print(render(outcome.report, color=sys.stdout.isatty()))
        if json_file:
            write_json(outcome.report, json_file)
        if record:
            write_record(outcome.results, record)
    except LoadgenError as error:
        print(f"loadgen: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("loadgen: interrupted before there was anything to report", file=sys.stderr)
        return INTERRUPTED
    if outcome.interrupted:
        return INTERRUPTED
    return PASSED if outcome.report.passed else FAILED


def prepare_process() -> None:
    """Fits this process to its job; for one that does nothing else.

    Every request in flight holds a socket, and the soft limit is often 1024. What lives by now lives to the end:
    garbage collection need not walk it while requests are timed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.freeze()
