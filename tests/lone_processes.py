"""`pdserve engine` and `pdserve rank-host`, started as by hand."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.checkpoints import make_checkpoint
from tests.deployment import write_config
from tests.pods import PDSERVE
from tests.waiting import eventually


@contextmanager
def running(log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[bytes]"]:
    """`pdserve ARGUMENTS`, its output appended to the log; killed at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen([*prefix, *PDSERVE, *arguments], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(holds: Callable[[], bool], within: float, log: Path) -> None:
    """Fails with the log."""
    eventually(holds, within, lambda: log.read_text(encoding="utf-8"))


def two_hosts(folder: Path) -> str:
    """The configuration of decode engines whose two ranks are on two hosts."""
    settings = {
        "model": str(make_checkpoint(folder / "qwen3", "qwen3")),
        "device": "cpu",
        "kv": {"num_blocks": 256},
        "pools": {"decode": {"tensor_parallel": 2, "hosts": 2}},
    }
    return str(write_config(folder / "engine.yaml", settings))


def engine(config: str, host: str) -> tuple[str, ...]:
    """What `running` starts as an engine."""
    return "engine", config, "--role", "decode", "--name", "d0", "--host", host


def rank_host(config: str, leader: str, host: str) -> tuple[str, ...]:
    """As the host of the other rank; leader is the engine's address."""
    return "rank-host", config, "--leader", f"{leader}:8102", "--host", host


def ready(address: str) -> bool:
    """By its probe."""
    try:
        return httpx.get(f"http://{address}:8101/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
