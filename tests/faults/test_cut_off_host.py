"""An engine whose ranks are on two machines that stop hearing each other: both sides notice by themselves, and when the
line is back so is the engine."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants
from tests.deployment import write_config
from tests.lone_processes import ready, running, until
from tests.namespaces import Hosts, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(240),
]
NOTICED_WITHIN = 8.0
"""Four seconds of silence, whoever notices first: the kernel or the engine, which then asks the host for two more."""


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
        engine = ("engine", config, "--role", "decode", "--name", "d0", "--host", leader)
        held.enter_context(running(log, *engine, prefix=hosts.on("leader")))
        host = ("rank-host", config, "--leader", f"{leader}:8102", "--host", other)
        far = held.enter_context(running(log, *host, prefix=hosts.on("other")))
        until(lambda: ready(leader) and ready(other), 60, log)
        assert descendants(far.pid)
        with hosts.cut(("leader", "other"), ("other", "leader")):
            until(lambda: not ready(leader), NOTICED_WITHIN, log)
            until(lambda: not descendants(far.pid), NOTICED_WITHIN, log)
            assert not ready(other)
        until(lambda: ready(leader) and ready(other), 60, log)
