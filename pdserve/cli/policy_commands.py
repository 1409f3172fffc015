"""Commands of scaling policies. What they do is imported when they run."""

from pathlib import Path
from typing import Annotated

import typer

policy_app = typer.Typer(help="Scaling policies: how many engines there are, and why.", no_args_is_help=True)


@policy_app.command(name="check")
def check_policy(
    file: Annotated[Path, typer.Argument(metavar="POLICIES.yaml", help="As docs/autoscaling.md describes it.")],
) -> None:
    """Only report the problems of a scaling policy, all at once, with their lines; exit code 2 when there are any."""
    from pdserve.scaler.load import load_policy

    load_policy(file)
    typer.echo("the policy is valid")


@policy_app.command(name="explain")
def explain_policy(
    latest: Annotated[int, typer.Option(help="So many of the latest decisions.")] = 10,
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="For programs instead of people.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Show how many engines a running cluster wants, and the decisions that led there with their reasons."""
    from pdserve.cli.admin import ask_admin
    from pdserve.cli.policy import render_explanation

    answer = ask_admin(host, port, "/admin/scaling", api_key)
    typer.echo(answer.decode() if as_json else render_explanation(answer, latest))


@policy_app.command(name="replay")
def replay_policy(
    file: Annotated[Path, typer.Argument(metavar="POLICIES.yaml", help="The policy to try.")],
    trace: Annotated[Path, typer.Argument(help="Mooncake, Bailian or Azure trace, or CSV of lengths; may be gzipped.")],
    engines: Annotated[
        str | None, typer.Option(help="How many at the start, as 2p2d or 4u (default: min of each pool).")
    ] = None,
    profile: Annotated[str, typer.Option(help="demo-cpu, h200-8b, or a YAML file.")] = "h200-8b",
    kv_tokens: Annotated[
        int | None, typer.Option(help="KV of each engine, in tokens (default: the profile's).")
    ] = None,
    warm_up: Annotated[
        float | None, typer.Option(help="Seconds until a new engine serves (default: the policy's).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    speed: Annotated[float, typer.Option(help="How many times faster requests arrive.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Only so many requests.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs instead of people.")] = False,
) -> None:
    """Serve a trace on simulated engines that come and go by a policy: engines over time, targets met, engine-seconds,
    and which rule did what.

    Exit code 1 when fewer requests than the policy's percentiles met its objectives."""
    from pdserve.cli.policy import ReplayOptions, render_replay, replay, replayed_json
    from pdserve_loadgen.traces import Scaling

    report = replay(
        ReplayOptions(
            policy=file,
            trace=trace,
            scaling=Scaling(speed=speed, limit=limit),
            engines=engines,
            profile=profile,
            kv_tokens=kv_tokens,
            warm_up=warm_up,
            seed=seed,
        )
    )
    typer.echo(replayed_json(report).decode() if as_json else render_replay(report), nl=not as_json)
    raise typer.Exit(0 if report.load.passed else 1)
