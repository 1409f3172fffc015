"""The command `loadgen`. What it does is imported when it runs, so that mounting it costs nothing.

Exit codes: 0 targets met (without targets: something was answered), 1 not met, 2 wrong options or no endpoint,
130 interrupted.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Put load on an OpenAI-compatible endpoint and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_ENDPOINT, _LOAD, _TEXT, _TRACE, _RESULTS = "Endpoint", "Load", "Prompts and answers", "Trace", "Results"


@app.callback()
def root() -> None:
    """Put load on an OpenAI-compatible endpoint and measure it."""


@app.command()
def run(
    url: Annotated[
        str, typer.Option(help="The endpoint, without /v1.", rich_help_panel=_ENDPOINT)
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Default: the first that /v1/models names.", rich_help_panel=_ENDPOINT)
    ] = None,
    api: Annotated[Literal["chat", "completions"], typer.Option(help="Which API.", rich_help_panel=_ENDPOINT)] = "chat",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["PDSERVE_API_KEY", "OPENAI_API_KEY"], help="If the endpoint wants one.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds per request.", rich_help_panel=_ENDPOINT)] = 600.0,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Open loop: requests per second.", rich_help_panel=_LOAD)
    ] = None,
    arrivals: Annotated[
        Literal["poisson", "constant"], typer.Option(help="Gaps between them.", rich_help_panel=_LOAD)
    ] = "poisson",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many at a time.", rich_help_panel=_LOAD)
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many (default 100; a trace: all).", rich_help_panel=_LOAD)
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.001, help="Send for so many seconds.", rich_help_panel=_LOAD)
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="First requests, sent but not measured.", rich_help_panel=_LOAD)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts, lengths, arrivals.", rich_help_panel=_LOAD)] = 0,
    input: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS",
            help="Prompt tokens: 512, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:CAP], empirical:FILE.csv:COLUMN.",
            rich_help_panel=_TEXT,
        ),
    ] = "512",
    output: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Answer tokens (max_tokens), alike.", rich_help_panel=_TEXT)
    ] = "128",
    prefix_tokens: Annotated[
        int, typer.Option(min=0, help="Prompts start with a shared prefix this long.", rich_help_panel=_TEXT)
    ] = 0,
    prefix_groups: Annotated[
        int, typer.Option(min=1, help="How many such prefixes there are.", rich_help_panel=_TEXT)
    ] = 1,
    turns: Annotated[
        int, typer.Option(min=1, help="Turns of a conversation, answers included.", rich_help_panel=_TEXT)
    ] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="Replay a Mooncake, Bailian or Azure trace (.gz too).", rich_help_panel=_TRACE)
    ] = None,
    speed: Annotated[float, typer.Option(min=1e-6, help="Trace: times as fast.", rich_help_panel=_TRACE)] = 1.0,
    length_scale: Annotated[float, typer.Option(min=1e-6, help="Trace: times as long.", rich_help_panel=_TRACE)] = 1.0,
    max_input: Annotated[
        int | None, typer.Option(min=1, help="Trace: longer prompts are cut.", rich_help_panel=_TRACE)
    ] = None,
    max_output: Annotated[
        int | None, typer.Option(min=1, help="Trace: longer answers are cut.", rich_help_panel=_TRACE)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the model: exact prompt lengths.", rich_help_panel=_TEXT)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for full-length answers; not every server knows it.", rich_help_panel=_ENDPOINT)
    ] = True,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="More fields for every request.", rich_help_panel=_ENDPOINT)
    ] = None,
    cancel_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share to hang up on midway.", rich_help_panel=_LOAD)
    ] = 0.0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="TARGETS",
            help="E.g. ttft=0.5,tpot=0.05,attainment=0.9 (seconds); also itl, e2e, handoff_gap.",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.", rich_help_panel=_RESULTS)
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every request as JSON lines.", rich_help_panel=_RESULTS)
    ] = None,
) -> None:
    """Send requests, watch the clock, print a report. Needs --rate, --concurrency or --trace."""
    options = dict(locals())
    files = options.pop("json_file"), options.pop("record")
    from pdserve_loadgen.command import execute, prepare_process

    prepare_process()
    raise typer.Exit(execute(options, *files))
