"""Commands and options. What they do is imported when they run, so that --help and --version are instant."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pdserve
from pdserve.cli.policy_commands import policy_app
from pdserve_loadgen.cli import app as loadgen_app

if TYPE_CHECKING:
    from pdserve.config.schema import Config

app = typer.Typer(
    help="Disaggregated LLM serving: prefill and decode engines with verified KV transfer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
keys_app = typer.Typer(help="API keys of tenants.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(policy_app, name="policy")
app.add_typer(loadgen_app, name="loadgen")

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings; flags win over it.")]

Workers = Annotated[int | None, typer.Option(help="Processes that speak with clients (default 1).")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pdserve {pdserve.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def serve(
    config: ConfigFile = None,
    model: Annotated[str | None, typer.Option(help='Hugging Face checkpoint directory, or "demo" (default).')] = None,
    prefill: Annotated[int | None, typer.Option(help="Number of prefill engines (default 1).")] = None,
    decode: Annotated[int | None, typer.Option(help="Number of decode engines (default 1).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port (default 8000 or $PORT).")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port (default 8001 or $GRPC_PORT).")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of /admin and /metrics (default 8002 or $ADMIN_PORT).")
    ] = None,
    workers: Workers = None,
    launcher: Annotated[str | None, typer.Option(help="What starts engines: ray (default) or process.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    only: Annotated[
        str | None, typer.Option(help="router: serve with engines that others announce in Redis; engines: the others.")
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Redis that several routers share: redis://host[:port].")] = None,
    policies: Annotated[
        str | None, typer.Option(help="File with a scaling policy; without, pools stay as they are.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the effective configuration and exit.")] = False,
) -> None:
    """Start engines and gateway and serve until Ctrl-C, which lets running requests finish."""
    flags = {
        "model": model,
        "pools.prefill.engines": prefill,
        "pools.decode.engines": decode,
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "admin_port": admin_port,
        "workers": workers,
        "launcher": launcher,
        "device": device,
        "only": only,
        "redis.url": redis,
        "policies": policies,
    }
    effective = _load(config, env=os.environ, flags=flags)
    if dry_run:
        _print_config(effective)
        return
    from pdserve.launch.serve import serve as run

    raise typer.Exit(run(effective))


@app.command()
def engine(
    config: ConfigFile = None,
    role: Annotated[str, typer.Option(help="prefill, decode or unified.")] = "decode",
    name: Annotated[str | None, typer.Option(help="What the engine is called (default: this machine's name).")] = None,
    host: Annotated[str, typer.Option(help="Address at which gateways and other engines reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port for them.")] = 8100,
    probe_port: Annotated[int, typer.Option(help="HTTP port of /live and /ready.")] = 8101,
    gang_port: Annotated[
        int, typer.Option(help="Port for `pdserve rank-host`, where its ranks have several hosts.")
    ] = 8102,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
) -> None:
    """Start one engine, for `pdserve route` to find at its address; SIGTERM drains it."""
    import socket

    from pdserve.core.endpoint import Role
    from pdserve.core.errors import ConfigError
    from pdserve.launch.lone_engine import EnginePlace, run_engine

    if role not in tuple(Role):
        raise ConfigError(f"--role: must be {', '.join(Role)}, not {role!r}")
    effective = _load(config, env={}, flags={"device": device})
    place = EnginePlace(
        name=name or socket.gethostname(),
        role=Role(role),
        host=host,
        port=port,
        probe_port=probe_port,
        gang_port=gang_port,
    )
    raise typer.Exit(run_engine(effective, place))


@app.command("rank-host")
def rank_host(
    config: ConfigFile = None,
    leader: Annotated[str, typer.Option(help="HOST:PORT, its port the --gang-port of the `pdserve engine`.")] = "",
    index: Annotated[int, typer.Option(help="Which host of the engine's ranks this is, from 1 on.")] = 1,
    host: Annotated[str, typer.Option(help="Address at which the engine's other ranks reach these.")] = "127.0.0.1",
    probe_port: Annotated[int, typer.Option(help="HTTP port of /live and /ready.")] = 8101,
) -> None:
    """Start some of an engine's ranks for a `pdserve engine` on another machine (pools.<role>.hosts); SIGTERM lets it
    drain."""
    from pdserve.launch.lone_rank_host import HostPlace, run_rank_host

    place = HostPlace(number=index, leader=leader, host=host, probe_port=probe_port)
    raise typer.Exit(run_rank_host(_load(config, env={}), place))


@app.command()
def scale(
    config: Annotated[Path | None, typer.Option(metavar="CONFIG.yaml", help="Settings.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address at which gateways and probes reach it (default: the setting host).")
    ] = None,
    probe_port: Annotated[int, typer.Option(help="HTTP port of /live, /ready and /metrics.")] = 8101,
) -> None:
    """Decide how many engines there are where each is a pod on Kubernetes, and scale what holds them (extra k8s).

    Of several, one acts."""
    from pdserve.launch.scale import ScalerPlace
    from pdserve.launch.scale import scale as run

    effective = _load(config, env={})
    raise typer.Exit(run(effective, ScalerPlace(host=host or effective.host, probe_port=probe_port)))


@app.command()
def route(
    config: ConfigFile = None,
    engines: Annotated[
        list[str] | None, typer.Option("--engine", help="host:port of an engine, or a name of several; repeatable.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port (default 8000 or $PORT).")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port (default 8001 or $GRPC_PORT).")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of /admin and /metrics (default 8002 or $ADMIN_PORT).")
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Redis that several routers share: redis://host[:port].")] = None,
    workers: Workers = None,
) -> None:
    """Start a gateway for engines that `pdserve engine` has started here or elsewhere, and serve until Ctrl-C."""
    flags = {
        "discovery.engines": engines or None,
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "admin_port": admin_port,
        "redis.url": redis,
        "workers": workers,
    }
    effective = _load(config, env=os.environ, flags=flags)
    from pdserve.launch.route import route as run

    raise typer.Exit(run(effective))


@app.command()
def status(
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="For programs instead of people.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Show every engine: role, state, load and KV blocks."""
    from pdserve.cli.admin import ask_admin
    from pdserve.cli.status import render

    answer = ask_admin(host, port, "/admin/engines", api_key)
    if as_json:
        typer.echo(answer.decode())
    else:
        typer.echo(render(answer, ask_admin(host, port, "/admin/links", api_key)))


@app.command()
def doctor(
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="For programs instead of people.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Check the way of KV between every pair of engines, with test patterns in spare blocks of their pools.

    Running requests go on. Exit code 1 when something must be mended."""
    from pdserve.cli.doctor import examine, render, to_json

    examination = examine(host, port, api_key)
    typer.echo(to_json(examination) if as_json else render(examination))
    raise typer.Exit(0 if examination.passed else 1)


@app.command()
def drain(
    engine: Annotated[str, typer.Argument(help="Its name, as in `pdserve status`.")],
    stay: Annotated[bool, typer.Option("--stay-away", help="Do not start it again; `pdserve start` does.")] = False,
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Empty an engine and restart it: what runs there moves to others, new requests go elsewhere.

    Returns once the engine has ended."""
    from pdserve.cli.drain import drain as run

    typer.echo(run(engine, host, port, api_key, stay=stay))


@app.command()
def start(
    engine: Annotated[str, typer.Argument(help="One that was drained to stay away.")],
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Start an engine again that was drained to stay away."""
    from pdserve.cli.drain import start as run

    typer.echo(run(engine, host, port, api_key))


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="Mooncake, Bailian or Azure trace, or CSV of lengths; may be gzipped.")],
    engines: Annotated[
        str, typer.Option(help="How many: 2p2d is two prefill and two decode engines, 4u four of both.")
    ] = "2p2d",
    profile: Annotated[str, typer.Option(help="demo-cpu, h200-8b, or a YAML file.")] = "h200-8b",
    policy: Annotated[str, typer.Option(help="Routing policy, as in routing.policy.")] = "kv_aware",
    kv_tokens: Annotated[
        int | None, typer.Option(help="KV of each engine, in tokens (default: the profile's).")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block (default: the trace's, else 16).")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    speed: Annotated[float, typer.Option(help="How many times faster requests arrive.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Only so many requests.")] = None,
    slo: Annotated[str | None, typer.Option(help="Targets in seconds: ttft=2,tpot=0.05,attainment=0.9.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs instead of people.")] = False,
) -> None:
    """Serve a trace on simulated engines in virtual time: the real scheduler, router and dispatch, no model.

    Exit code 1 when the targets are missed."""
    from pdserve.cli.simulate import SimulateOptions, to_json
    from pdserve.cli.simulate import simulate as run
    from pdserve_loadgen.traces import Scaling

    report = run(
        SimulateOptions(
            trace=trace,
            scaling=Scaling(speed=speed, limit=limit),
            engines=engines,
            profile=profile,
            policy=policy,
            block_size=block_size,
            kv_tokens=kv_tokens,
            seed=seed,
            slo=slo,
        )
    )
    typer.echo(to_json(report).decode() if as_json else report.render(), nl=not as_json)
    raise typer.Exit(0 if report.load.passed else 1)


@app.command()
def calibrate(
    config: ConfigFile = None,
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Print a profile for `pdserve simulate` from what the running engines have shown under load.

    CONFIG.yaml is the one the deployment was started with."""
    from pdserve.cli.calibrate import calibrate as run

    typer.echo(run(_load(config, env=os.environ), host, port, api_key), nl=False)


@app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(help='`pdserve.request_id` of a response, its x-request-id, or "last".')
    ] = "last",
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Its HTTP port.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="For programs instead of people.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="PDSERVE_API_KEY", help="If the gateway wants one.")] = None,
) -> None:
    """Show where a request's time went, and why it took the engines it took."""
    from urllib.parse import quote

    from pdserve.cli.admin import ask_admin
    from pdserve.cli.explain import render

    answer = ask_admin(host, port, f"/admin/requests/{quote(request_id, safe='')}", api_key)
    typer.echo(answer.decode() if as_json else render(answer))


@keys_app.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whom it is for; only shown.")] = "NAME",
) -> None:
    """Make an API key: the key for the client, and its hash for `tenants` in the configuration."""
    from pdserve.cli.keys import new_key

    key, digest = new_key()
    typer.echo(f'{key}\n\ntenants:\n  - name: {tenant}\n    keys: ["{digest}"]')


@keys_app.command(name="hash")
def hash_key() -> None:
    """Print the hash of a key that you have, read from standard input, so that no shell remembers it."""
    import sys

    from pdserve.cli.keys import digest_of

    typer.echo(digest_of(sys.stdin.readline().strip()))


@config_app.command()
def show(config: ConfigFile = None) -> None:
    """Print the effective configuration as YAML: environment, file and defaults together, keys hidden."""
    _print_config(_load(config, env=os.environ))


@config_app.command()
def check(config: ConfigFile = None) -> None:
    """Only report the problems of a configuration, all at once; exit code 2 when there are any."""
    _load(config, env=os.environ)
    typer.echo("the configuration is valid")


def _print_config(config: "Config") -> None:
    import yaml

    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), nl=False)


def _load(path: Path | None, **sources: Any) -> "Config":
    """config.load.load_config, imported only now."""
    from pdserve.config.load import load_config

    return load_config(path, **sources)
