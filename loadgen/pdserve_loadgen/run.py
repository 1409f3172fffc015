"""A whole run: find the model, size the prompts, send, report."""

import asyncio
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from rich.console import Console

from pdserve_loadgen.client import Client, Clock
from pdserve_loadgen.endpoint import Endpoint
from pdserve_loadgen.errors import Unreachable, UsageError
from pdserve_loadgen.probe import size_prompts
from pdserve_loadgen.progress import show_progress
from pdserve_loadgen.prompts import PromptWriter, Sizing, common_words, words_of
from pdserve_loadgen.report import Report, RequestResult, build_report
from pdserve_loadgen.runner import Runner
from pdserve_loadgen.settings import Settings
from pdserve_loadgen.workload import PlannedRequest

SHORT_ANSWERS = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run gave. interrupted: the user ended it; the report covers what had ended by then."""

    report: Report
    results: list[RequestResult]
    interrupted: bool


async def run(settings: Settings, console: Console, clock: Clock = time.perf_counter) -> Run:
    """Raises UsageError and Unreachable before anything is measured; failures of requests are in the report."""
    settings.check()
    plan = settings.plan()
    words = words_of(settings.tokenizer) if settings.tokenizer else common_words()
    client = Client(await _endpoint(settings, clock), clock)
    try:
        sizing, notes = await size_prompts(client, PromptWriter(words, Sizing(), settings.seed))
        if notes and settings.tokenizer:
            sizing = Sizing(tokens_per_word=1.0)
        writer = PromptWriter(words, sizing, settings.seed)
        runner = Runner(client, writer, clock, f"loadgen-{secrets.token_hex(4)}")
        interrupted = not await _finish(runner, plan, settings, console)
    finally:
        await client.close()
    if interrupted:
        notes.append("interrupted: requests in flight are not counted")
    if settings.ignore_eos and runner.answered_share < SHORT_ANSWERS:
        share = f"{runner.answered_share:.0%}"
        notes.append(f"answers had {share} of the tokens asked for: the server ends them (it may not know ignore_eos)")
    report = build_report(
        runner.results, title=settings.title, slo=settings.targets(), notes=notes, settings=settings.to_dict()
    )
    return Run(report=report, results=runner.results, interrupted=interrupted)


async def _finish(runner: Runner, plan: Iterable[PlannedRequest], settings: Settings, console: Console) -> bool:
    """Whether the plan came to its end; False when the user ended it before."""
    drawing = asyncio.create_task(show_progress(runner, console))
    try:
        await runner.run(plan, settings.concurrency, settings.duration)
    except asyncio.CancelledError:
        return False
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
    return True


async def _endpoint(settings: Settings, clock: Clock) -> Endpoint:
    """The endpoint with a model: the one asked for, else the first the server names."""
    endpoint = Endpoint(
        url=settings.url.rstrip("/").removesuffix("/v1"),
        model=settings.model or "",
        api=settings.api,
        api_key=settings.api_key,
        extra=settings.body_fields(),
        timeout=settings.timeout,
    )
    if settings.model:
        return endpoint
    client = Client(endpoint, clock)
    try:
        models = await client.models()
    finally:
        await client.close()
    if not models:
        raise Unreachable(f"{settings.url} serves no model; give --model")
    return replace(endpoint, model=models[0])


def write_json(report: Report, path: Path) -> None:
    _write(path, (orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2), b"\n"))


def write_record(results: Iterable[RequestResult], path: Path) -> None:
    """One JSON object per line and request, in the order they ended."""
    _write(path, (orjson.dumps(result.to_dict()) + b"\n" for result in results))


def _write(path: Path, parts: Iterable[bytes]) -> None:
    try:
        with path.open("wb") as file:
            file.writelines(parts)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
