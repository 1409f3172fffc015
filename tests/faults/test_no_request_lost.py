"""An engine dies or freezes at a named point of a request's life, under 32 streams and either launcher: every one of
them ends with exactly the tokens of an undisturbed run."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve import RequestOutput, SamplingParams
from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.contract.processes import descendants
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask_all, expected
from tests.strikes import order_strike

STREAMS = 32
PREFILL_POINTS = ("queued", "leased", "prefilling", "last_chunk", "first_token")
DECODE_POINTS = ("queued", "transferring", "decoding")
EVERYWHERE = [("prefill-0", p) for p in PREFILL_POINTS] + [("decode-0", p) for p in DECODE_POINTS]
BEFORE_DURING_AFTER_HANDOFF = [
    ("prefill-0", "last_chunk", "kill"),
    ("decode-0", "transferring", "kill"),
    ("decode-0", "decoding", "stop"),
]
POOLS = {
    "prefill": {"engines": 2, "chunk_size": 64, "max_tokens_per_step": 128, "prefix_caching": False},
    "decode": {"engines": 2, "prefix_caching": False},
}
"""Without prefix caches every prompt passes every point, however often it was asked before."""
EXTRA_PAUSE = {"kill": 4.0, "stop": 6.0}
"""Seconds a client may wait for a chunk. A frozen engine is told by 3 s of silence."""
PASSED_OVER = 60.0
"""Seconds within which an engine gets requests again that was thought slow."""
WORKERS = "workers"
"""The bench whose engines have a worker process each, as with GPUs."""
under_every_launcher = pytest.mark.parametrize(
    "bench", ["process", pytest.param("ray", marks=pytest.mark.slow)], indirect=True
)


@dataclass
class Bench:
    deployment: Deployment
    failpoints: Path
    asks: list[Ask]
    wanted: list[RequestOutput]

    def judge(self, streams: list[Stream]) -> None:
        pairs = enumerate(zip(streams, self.wanted, strict=True))
        assert not [f"stream {n} {wrong}" for n, (stream, wanted) in pairs if (wrong := stream.wrong(wanted))]


def make_asks(streams: int = STREAMS, max_tokens: int = 24) -> list[Ask]:
    return [
        Ask(
            tuple((19 * i + 7 * (n % 11)) % VOCAB_SIZE for i in range(40 + 9 * n)),
            SamplingParams(
                temperature=0.0 if n % 2 else 0.8,
                seed=n,
                repetition_penalty=1.1 if n % 3 else 1.0,
                max_tokens=max_tokens,
                ignore_eos=True,
                logprobs=True,
            ),
        )
        for n in range(streams)
    ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A deployment under the launcher that the test names, or with workers in processes of their own."""
    folder = tmp_path_factory.mktemp("no_request_lost")
    checkpoint = make_checkpoint(folder / "model", "qwen3")
    failpoints = folder / "failpoints"
    failpoints.mkdir()
    asks = make_asks()
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "worker": "process" if request.param == WORKERS else "auto",
        "routing": {"decode_local_below": 0},
        "kv": {"num_blocks": 2048},
        "pools": POOLS,
        # One engine dies again and again here, on purpose.
        "times": {"restart_backoff_max": 1.0},
    }
    config = write_config(folder / "cluster.yaml", settings)
    env = {ENVIRONMENT: str(failpoints)}
    launcher = "process" if request.param == WORKERS else request.param
    with deployed(folder / "serve.log", str(config), "--launcher", launcher, env=env) as deployment:
        yield Bench(deployment, failpoints, asks, expected(checkpoint, asks))


@pytest.mark.timeout(240)
@under_every_launcher
@pytest.mark.parametrize(("victim", "point"), EVERYWHERE)
def test_killed(bench: Bench, victim: str, point: str) -> None:
    strike(bench, victim, point, "kill")


@pytest.mark.slow
@pytest.mark.timeout(240)
@under_every_launcher
@pytest.mark.parametrize(("victim", "point"), EVERYWHERE)
def test_frozen(bench: Bench, victim: str, point: str) -> None:
    strike(bench, victim, point, "stop")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("bench", ["ray"], indirect=True)
@pytest.mark.parametrize(("victim", "point", "blow"), BEFORE_DURING_AFTER_HANDOFF)
def test_lost_under_ray(bench: Bench, victim: str, point: str, blow: str) -> None:
    strike(bench, victim, point, blow)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("bench", [WORKERS], indirect=True)
@pytest.mark.parametrize(
    ("victim", "point", "blow"),
    [
        *((*where, "kill") for where in EVERYWHERE),
        ("prefill-0", "last_chunk", "stop"),
        ("decode-0", "decoding", "stop"),
    ],
)
def test_lost_worker(bench: Bench, victim: str, point: str, blow: str) -> None:
    strike(bench, victim, point, blow, worker=True)


def strike(bench: Bench, victim: str, point: str, blow: str, *, worker: bool = False) -> None:
    """worker: it is not the engine itself that suffers the blow."""
    deployment = bench.deployment

    def whole() -> bool:
        engines = deployment.engines().values()
        blocks = [engine["kv_blocks"] for engine in engines]
        return (
            len(engines) == 4
            and all(e["state"] == "ready" for e in engines)
            and all(b["free"] == b["total"] for b in blocks)
        )

    deployment.eventually(whole)
    whom = descendants(deployment.engines()[victim]["pid"]) if worker else []
    order = order_strike(bench.failpoints, victim, point, " ".join([blow, *map(str, whom)]))
    until = time.monotonic() + PASSED_OVER
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [future.result() for future in ask_all(deployment, bench.asks, pool)]
        # An engine that has just been slow, for want of a processor, gets nothing for a while.
        while order.exists() and time.monotonic() < until:
            bench.judge(streams)
            streams = [future.result() for future in ask_all(deployment, bench.asks, pool)]
    assert not order.exists(), f"the engine never came to this point: {streams[0].record['reason']}"
    bench.judge(streams)
    replayed = [stream for stream in streams if stream.record["failed_attempts"]]
    assert replayed, "nobody was served by the engine that was lost"
    lost = [stream.record["failed_attempts"] for stream in replayed]
    assert not [attempts for attempts in lost if len(attempts) > 1], "an engine was blamed for another's loss"
    assert max(stream.longest_pause for stream in streams) < EXTRA_PAUSE[blow]
    deployment.eventually(whole)
