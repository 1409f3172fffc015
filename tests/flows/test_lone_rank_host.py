"""A host of ranks beside an engine, both started by hand, asked to end while the engine has no reason to."""

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdserve.launch.running import EXIT_FORCED
from tests.contract.processes import descendants, is_gone
from tests.lone_processes import engine, rank_host, ready, running, two_hosts, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ENGINE, OTHER = "127.0.73.1", "127.0.73.2"


def test_one_signal_waits_for_the_engine_and_the_second_does_not(tmp_path: Path) -> None:
    config, log = two_hosts(tmp_path), tmp_path / "log"
    host = rank_host(config, ENGINE, OTHER)
    with ExitStack() as held:
        held.enter_context(running(log, *engine(config, ENGINE)))
        with running(log, *host) as leaving:
            until(lambda: ready(ENGINE) and ready(OTHER), 60, log)
            (rank,) = descendants(leaving.pid)
            leaving.send_signal(signal.SIGTERM)
            assert not is_gone(leaving.pid, 1)
            assert ready(ENGINE)
            leaving.send_signal(signal.SIGTERM)
            assert leaving.wait(10) == EXIT_FORCED
            assert is_gone(rank, 5)
        until(lambda: not ready(ENGINE), 10, log)
        held.enter_context(running(log, *host))
        until(lambda: ready(ENGINE) and ready(OTHER), 60, log)
