"""A host of ranks beside an engine, both started by hand, asked to end while the engine has no reason to."""

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdserve.launch.running import EXIT_FORCED
from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants, is_gone
from tests.deployment import write_config
from tests.lone_processes import ready, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ENGINE, OTHER = "127.0.73.1", "127.0.73.2"


def test_one_signal_waits_for_the_engine_and_the_second_does_not(tmp_path: Path) -> None:
    settings = {
        "model": str(make_checkpoint(tmp_path / "qwen3", "qwen3")),
        "device": "cpu",
        "kv": {"num_blocks": 256},
        "pools": {"decode": {"tensor_parallel": 2, "hosts": 2}},
    }
    config, log = str(write_config(tmp_path / "engine.yaml", settings)), tmp_path / "log"
    host = ("rank-host", config, "--leader", f"{ENGINE}:8102", "--host", OTHER)
    with ExitStack() as held:
        engine = ("engine", config, "--role", "decode", "--name", "d0", "--host", ENGINE)
        held.enter_context(running(log, *engine))
        with running(log, *host) as leaving:
            until(lambda: ready(ENGINE) and ready(OTHER), 60, log)
            (rank,) = descendants(leaving.pid)
            leaving.send_signal(signal.SIGTERM)
            assert not is_gone(leaving.pid, 1)
            assert ready(ENGINE)
            leaving.send_signal(signal.SIGTERM)
            assert leaving.wait(10) == EXIT_FORCED
            assert is_gone(rank, 1)
        until(lambda: not ready(ENGINE), 10, log)
        held.enter_context(running(log, *host))
        until(lambda: ready(ENGINE) and ready(OTHER), 60, log)
