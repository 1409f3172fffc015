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
EXTRA_PAUSE = 10.0
"""Seconds a client may wait for a chunk: a cut is told by 3 to 4 s of silence, and then few engines compute all
prompts again."""
TRIES = 8
"""Requests that may try a lost link while the 32 after the first are served: one per back-off."""
HEALED = 60.0
"""Seconds for transfers under way at the cut to end, and for handoffs to be tried again."""


@dataclass
class Bench:
    deployment: Deployment
    hosts: Hosts
    failpoints: Path
    asks: list[Ask]
    wanted: list[RequestOutput]

    def settled(self) -> dict[str, str]:
        """Every engine's epoch, once all are ready and every block is free."""

        def whole() -> bool:
            engines = self.deployment.engines().values()
            blocks = [engine["kv_blocks"] for engine in engines]
            return all(e["state"] == "ready" for e in engines) and all(b["free"] == b["total"] for b in blocks)

        self.deployment.eventually(whole, within=HEALED)
        return {name: engine["epoch"] for name, engine in self.deployment.engines().items()}

    @contextmanager
    def cut_at(
        self, engine: str, point: str, pool: ThreadPoolExecutor, *lines: tuple[str, str]
    ) -> Iterator["list[Future[Stream]]"]:
        """Send all requests, and cut lines at the moment the engine comes to a point: it stands still until they
        are cut. They are mended when the context is left."""
        taken = self.failpoints / f"{engine}.{point}.taken"
        (self.failpoints / f"{engine}.{point}").write_text("stop", encoding="utf-8")
        pid = self.deployment.engines()[engine]["pid"]
        futures = ask_all(self.deployment, self.asks, pool)
        self.deployment.eventually(taken.exists)
        with self.hosts.cut(*lines):
            os.kill(pid, signal.SIGCONT)
            taken.unlink()
            yield futures

    def judge(self, futures: "list[Future[Stream]]") -> list[Stream]:
        """The streams, once they have ended, every one of them right."""
        streams = [future.result() for future in futures]
        both = zip(streams, self.wanted, strict=True)
        assert not [f"stream {n} {wrong}" for n, (s, o) in enumerate(both) if (wrong := s.wrong(o))]
        assert max(stream.longest_pause for stream in streams) < EXTRA_PAUSE
        return streams

    def told_at_once(self, streams: list[Stream]) -> None:
        """Nobody waited for the silence of a cut line again: few were sent over it, and those were refused."""
        attempts = [attempt for stream in streams for attempt in stream.record["failed_attempts"]]
        assert len(attempts) <= TRIES
        assert all("it is tried again" in attempt["message"] for attempt in attempts), attempts

    def resumed(self, wanted: set[tuple[str, str]]) -> None:
        """Ask until each of these pairs has served a handoff."""
        served: set[tuple[str, str]] = set()

        def all_have() -> bool:
            with ThreadPoolExecutor(STREAMS) as pool:
                served.update(pairs(self.judge(ask_all(self.deployment, self.asks, pool))))
            return wanted <= served

        self.deployment.eventually(all_have, within=HEALED)


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
            # By load alone, so that every pair gets requests: standing still at the cut looks like being slow.
            "routing": {"decode_local_below": 0, "policy": "least_loaded"},
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


@pytest.fixture(scope="module")
def two_pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("two_pairs"), 2) as opened:
        yield opened


def both_ways(prefill: str, decode: str) -> tuple[tuple[str, str], ...]:
    return (prefill, decode), (decode, prefill)


CUTS = {
    "both ways": both_ways("prefill-0", "decode-0"),
    "prefill to decode": (("prefill-0", "decode-0"),),
    "decode to prefill": (("decode-0", "prefill-0"),),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("engine", "point"), [("decode-0", "transferring"), ("prefill-0", "leased")])
def test_the_only_pair_is_cut(one_pair: Bench, cut: str, engine: str, point: str) -> None:
    epochs = one_pair.settled()
    with ThreadPoolExecutor(STREAMS) as pool:
        with one_pair.cut_at(engine, point, pool, *CUTS[cut]) as under_way:
            struck = one_pair.judge(under_way)
            assert "link_lost" in codes(struck)
            later = one_pair.judge(ask_all(one_pair.deployment, one_pair.asks, pool))
            one_pair.told_at_once(later)
            assert {stream.record["mode"] for stream in later} <= {"decode_local", "prefill_local"}
        one_pair.resumed({("prefill-0", "decode-0")})
        assert one_pair.settled() == epochs, "nobody had to be started again"


def test_one_of_four_pairs_is_cut(two_pairs: Bench) -> None:
    epochs = two_pairs.settled()
    lines = both_ways("prefill-0", "decode-0")
    with ThreadPoolExecutor(STREAMS) as pool:
        with two_pairs.cut_at("decode-0", "transferring", pool, *lines) as under_way:
            two_pairs.judge(under_way)
            later = two_pairs.judge(ask_all(two_pairs.deployment, two_pairs.asks, pool))
            two_pairs.told_at_once(later)
            assert ("prefill-0", "decode-0") not in pairs(later)
            assert pairs(later), "the other links go on serving handoffs"
        two_pairs.resumed({("prefill-0", "decode-0")})
        assert two_pairs.settled() == epochs


def test_the_pools_are_cut_from_each_other(two_pairs: Bench) -> None:
    epochs = two_pairs.settled()
    every = {(f"prefill-{p}", f"decode-{d}") for p in range(2) for d in range(2)}
    lines = [line for pair in sorted(every) for line in both_ways(*pair)]
    with ThreadPoolExecutor(STREAMS) as pool:
        with two_pairs.cut_at("decode-0", "transferring", pool, *lines) as under_way:
            assert "link_lost" in codes(two_pairs.judge(under_way))
        two_pairs.resumed(every)
        assert two_pairs.settled() == epochs


def codes(streams: list[Stream]) -> set[str]:
    return {attempt["code"] for stream in streams for attempt in stream.record["failed_attempts"]}


def pairs(streams: list[Stream]) -> set[tuple[str, str]]:
    """(prefill, decode) of every handoff that served one."""
    records = [stream.record for stream in streams if stream.record["mode"] == "disaggregated"]
    return {(record["prefill"]["engine"], record["decode"]["engine"]) for record in records}
