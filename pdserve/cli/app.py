"""Commands and options. What they do is imported when they run, so that --help and --version are instant."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pdserve

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

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings; flags win over it.")]


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
    launcher: Annotated[str | None, typer.Option(help="What starts engines: ray (default) or process.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
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
        "launcher": launcher,
        "device": device,
    }
    effective = _load(config, env=os.environ, flags=flags)
    if dry_run:
        _print_config(effective)
        return
    from pdserve.launch.serve import serve as run

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
    typer.echo(answer.decode() if as_json else render(answer), nl=True)


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
