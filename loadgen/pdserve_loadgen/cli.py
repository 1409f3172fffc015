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


@app.callback()
def root() -> None:
    """Put load on an OpenAI-compatible endpoint and measure it."""


@app.command()
def run(
    url: Annotated[str, typer.Option(help="The endpoint, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that /v1/models names.")] = None,
    api: Annotated[Literal["chat", "completions"], typer.Option(help="Which API.")] = "chat",
    api_key: Annotated[
        str | None, typer.Option(envvar=["PDSERVE_API_KEY", "OPENAI_API_KEY"], help="If the endpoint wants one.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds per request.")] = 600.0,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Open loop: requests per second.")] = None,
    arrivals: Annotated[Literal["poisson", "constant"], typer.Option(help="Gaps between them.")] = "poisson",
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: so many at a time.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="How many (default 100; a trace: all).")] = None,
    duration: Annotated[float | None, typer.Option(min=0.001, help="Send for so many seconds.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="First requests, sent but not measured.")] = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts, lengths, arrivals.")] = 0,
    input: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS",
            help="Prompt tokens: 512, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:CAP], empirical:FILE.csv:COLUMN.",
        ),
    ] = "512",
    output: Annotated[str, typer.Option(metavar="LENGTHS", help="Answer tokens (max_tokens), alike.")] = "128",
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Prompts start with a shared prefix this long.")] = 0,
    prefix_groups: Annotated[int, typer.Option(min=1, help="How many such prefixes there are.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="Turns of a conversation, answers included.")] = 1,
    trace: Annotated[Path | None, typer.Option(help="Replay a Mooncake, Bailian or Azure trace (.gz too).")] = None,
    speed: Annotated[float, typer.Option(min=1e-6, help="Trace: times as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(min=1e-6, help="Trace: times as long.")] = 1.0,
    max_input: Annotated[int | None, typer.Option(min=1, help="Trace: longer prompts are cut.")] = None,
    max_output: Annotated[int | None, typer.Option(min=1, help="Trace: longer answers are cut.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json of the model: exact prompt lengths.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for full-length answers; not every server knows it.")] = True,
    extra_body: Annotated[str | None, typer.Option(metavar="JSON", help="More fields for every request.")] = None,
    cancel_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share to hang up on midway.")] = 0.0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="TARGETS", help="E.g. ttft=0.5,tpot=0.05,attainment=0.9 (seconds); also itl, e2e, handoff_gap."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every request as JSON lines.")] = None,
) -> None:
    """Send requests, watch the clock, print a report. Needs --rate, --concurrency or --trace."""
    options = dict(locals())
    files = options.pop("json_file"), options.pop("record")
    from pdserve_loadgen.command import execute

    raise typer.Exit(execute(options, *files))
