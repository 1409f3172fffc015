"""An engine whose ranks are on two machines that stop hearing each other: both sides notice by themselves, and when the
line is back so is the engine."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants
from tests.deployment import write_config
from tests.namespaces import Hosts, missing
from tests.pods import PDSERVE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(240),
]
NOTICED_WITHIN = 8.0
"""Four seconds of silence, whoever notices first: the kernel or the engine, which then asks the host for two more."""


@contextmanager
def running(hosts: Hosts, name: str, log: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`pdserve ARGUMENTS` on a host."""
    with log.open("ab") as output:
        command = ["ip", "netns", "exec", f"{hosts.prefix}{name}", *PDSERVE, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(holds: Callable[[], bool], within: float, log: Path) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.1)


def ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}:8101/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_host_that_is_cut_off_ends_its_ranks_and_its_engine_ends_and_both_come_back(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "qwen3", "qwen3")
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "kv": {"num_blocks": 256},
        "pools": {"decode": {"tensor_parallel": 2, "hosts": 2}},
    }
    config, log = str(write_config(tmp_path / "engine.yaml", settings)), tmp_path / "log"
    with ExitStack() as held:
        hosts = held.enter_context(Hosts(("leader", "other")))
        leader, other = hosts.address("leader"), hosts.address("other")
        engine = (config, "--role", "decode", "--name", "d0", "--host", leader)
        held.enter_context(running(hosts, "leader", log, "engine", *engine))
        told = (config, "--leader", f"{leader}:8102", "--host", other)
        far = held.enter_context(running(hosts, "other", log, "rank-host", *told))
        until(lambda: ready(leader) and ready(other), 60, log)
        assert descendants(far.pid)
        with hosts.cut(("leader", "other"), ("other", "leader")):
            until(lambda: not ready(leader), NOTICED_WITHIN, log)
            until(lambda: not descendants(far.pid), NOTICED_WITHIN, log)
            assert not ready(other)
        until(lambda: ready(leader) and ready(other), 60, log)
