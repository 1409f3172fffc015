"""The lines between prefill and decode engines are cut while everything else is well: all streams end with exactly
the tokens of an undisturbed run, blocks come back, and handoffs resume when the lines are mended."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve import RequestOutput
from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.faults.test_no_request_lost import make_asks
from tests.namespaces import Hosts, missing
from tests.streams import Ask, Stream, ask_all, expected

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

STREAMS = 32
EXTRA_PAUSE = 6.0
"""Seconds a client may wait for a chunk: a cut is told by 3 s of silence."""
HEALED = 60.0
"""Seconds for transfers under way at the cut to end, and for handoffs to be tried again."""


@dataclass
class Bench:
    deployment: Deployment
    hosts: Hosts
    failpoints: Path
    asks: list[Ask]
    wanted: list[RequestOutput]

    def whole(self) -> bool:
        engines = self.deployment.engines().values()
        blocks = [engine["kv_blocks"] for engine in engines]
        return all(e["state"] == "ready" for e in engines) and all(b["free"] == b["total"] for b in blocks)

    def epochs(self) -> set[str]:
        return {engine["epoch"] for engine in self.deployment.engines().values()}

    @contextmanager
    def cut_at(self, engine: str, point: str, *lines: tuple[str, str]) -> Iterator[None]:
        """Cut lines at the moment the engine comes to a point: it stands still while they are cut."""
        taken = self.failpoints / f"{engine}.{point}.taken"
        self.deployment.eventually(taken.exists)
        with self.hosts.cut(*lines):
            os.kill(self.deployment.engines()[engine]["pid"], signal.SIGCONT)
            taken.unlink()
            yield

    def judge(self, futures: "list[Future[Stream]]") -> list[Stream]:
        """The streams, once they have ended, every one of them right."""
        streams = [future.result() for future in futures]
        pairs = zip(streams, self.wanted, strict=True)
        assert not [f"stream {n} {wrong}" for n, (s, o) in enumerate(pairs) if (wrong := s.wrong(o))]
        assert max(stream.longest_pause for stream in streams) < EXTRA_PAUSE
        return streams


@contextmanager
def bench(folder: Path, engines: int) -> Iterator[Bench]:
    """As many prefill as decode engines, each on a host of its own."""
    checkpoint = make_checkpoint(folder / "model", "qwen3")
    failpoints = folder / "failpoints"
    failpoints.mkdir()
    names = tuple(f"{role}-{index}" for role in ("prefill", "decode") for index in range(engines))
    with Hosts(names) as hosts:
        settings = {
            "model": str(checkpoint),
            "device": "cpu",
            "port": 0,
            "grpc_port": 0,
            "admin_port": 0,
            "engine_network": hosts.network,
            "routing": {"decode_local_below": 0},
            "kv": {"num_blocks": 2048, "backends": ["nixl"]},
            "pools": {
                "prefill": {"engines": engines, "chunk_size": 64, "max_tokens_per_step": 128, "prefix_caching": False},
                "decode": {"engines": engines, "prefix_caching": False},
            },
        }
        config = write_config(folder / "cluster.yaml", settings)
        # Over TCP alone: the hosts share a kernel, through which UCX would copy without asking the network.
        env = {ENVIRONMENT: str(failpoints), "UCX_TLS": "tcp,self"}
        command = (sys.executable, "-m", "tests.faults.serve_on_hosts")
        with deployed(folder / "serve.log", str(config), hosts.prefix, env=env, command=command) as deployment:
            asks = make_asks(STREAMS)
            yield Bench(deployment, hosts, failpoints, asks, expected(checkpoint, asks))


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("one_pair"), 1) as opened:
        yield opened


def both_ways(prefill: str, decode: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (prefill, decode), (decode, prefill)


CUTS = {
    "both ways": both_ways("prefill-0", "decode-0"),
    "prefill to decode": (("prefill-0", "decode-0"),),
    "decode to prefill": (("decode-0", "prefill-0"),),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("engine", "point"), [("decode-0", "transferring"), ("prefill-0", "leased")])
def test_a_cut_under_load_costs_a_pause_and_handoffs_resume(
    one_pair: Bench, cut: str, engine: str, point: str
) -> None:
    deployment = one_pair.deployment
    deployment.eventually(one_pair.whole)
    epochs = one_pair.epochs()
    (one_pair.failpoints / f"{engine}.{point}").write_text("stop", encoding="utf-8")
    with ThreadPoolExecutor(STREAMS) as pool:
        futures = ask_all(deployment, one_pair.asks, pool)
        with one_pair.cut_at(engine, point, *CUTS[cut]):
            streams = one_pair.judge(futures)
            for s in streams:
                print(round(s.longest_pause, 2), s.record["mode"], [a["code"] for a in s.record["failed_attempts"]])
    deployment.eventually(one_pair.whole, within=HEALED)
