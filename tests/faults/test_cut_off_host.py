"""An engine whose ranks are on two machines that stop hearing each other: both sides notice by themselves, and when the
line is back so is the engine."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.processes import descendants
from tests.lone_processes import engine, rank_host, ready, running, two_hosts, until
from tests.namespaces import Hosts, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(240),
]
NOTICED_WITHIN = 8.0
"""Four seconds of silence, whoever notices first: the kernel or the engine, which then asks the host for two more."""


def test_a_host_that_is_cut_off_ends_its_ranks_and_its_engine_ends_and_both_come_back(tmp_path: Path) -> None:
    config, log = two_hosts(tmp_path), tmp_path / "log"
    with ExitStack() as held:
        hosts = held.enter_context(Hosts(("leader", "other")))
        leader, other = hosts.address("leader"), hosts.address("other")
        held.enter_context(running(log, *engine(config, leader), prefix=hosts.on("leader")))
        far = held.enter_context(running(log, *rank_host(config, leader, other), prefix=hosts.on("other")))
        until(lambda: ready(leader) and ready(other), 60, log)
        assert descendants(far.pid)
        with hosts.cut(("leader", "other"), ("other", "leader")):
            until(lambda: not ready(leader), NOTICED_WITHIN, log)
            until(lambda: not descendants(far.pid), NOTICED_WITHIN, log)
            assert not ready(other)
        until(lambda: ready(leader) and ready(other), 60, log)
