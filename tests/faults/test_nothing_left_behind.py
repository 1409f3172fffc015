"""After many requests, finished and cancelled, every process has what it had before: blocks, threads, files."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pdserve import SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, ask

SEQUENTIAL = 1000
CONCURRENT = 200
AT_ONCE = 40
SPARE = 4
"""Files or threads a process may hold more than before: gRPC and the resolver keep a few by choice."""


@dataclass(frozen=True)
class Holdings:
    """What one process holds."""

    threads: int
    files: int


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("nothing_left")
    settings = {
        "model": str(make_checkpoint(folder / "model", "qwen3")),
        "device": "cpu",
        "kv": {"num_blocks": 1024},
        "pools": {"prefill": {"engines": 2}, "decode": {"engines": 2}},
    }
    with deployed(folder / "serve.log", str(write_config(folder / "cluster.yaml", settings))) as running:
        yield running


def make_ask(rng: random.Random, max_tokens: int) -> Ask:
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 200)))
    return Ask(prompt, SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True, logprobs=True))


def holdings(deployment: Deployment) -> dict[int, Holdings]:
    found = {}
    for pid in [deployment.process.pid, *deployment.children()]:
        process = Path(f"/proc/{pid}")
        found[pid] = Holdings(len(list((process / "task").iterdir())), len(list((process / "fd").iterdir())))
    return found


def assert_as_before(deployment: Deployment, before: dict[int, Holdings]) -> None:
    def blocks_are_free() -> bool:
        return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in deployment.engines().values())

    def as_before() -> bool:
        now = holdings(deployment)
        return now.keys() == before.keys() and all(
            now[pid].threads <= before[pid].threads + SPARE and now[pid].files <= before[pid].files + SPARE
            for pid in before
        )

    deployment.eventually(blocks_are_free, within=5)
    deployment.eventually(as_before, within=15)


def warm_up(deployment: Deployment) -> dict[int, Holdings]:
    """Let pools of threads and connections reach their sizes first."""
    rng = random.Random(1)
    with ThreadPoolExecutor(AT_ONCE) as clients:
        list(clients.map(lambda request: ask(deployment, request), [make_ask(rng, 4) for _ in range(2 * AT_ONCE)]))
    return holdings(deployment)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_thousand_requests_in_a_row(deployment: Deployment) -> None:
    before = warm_up(deployment)
    rng = random.Random(2)
    for _ in range(SEQUENTIAL):
        stream = ask(deployment, make_ask(rng, 3))
        assert stream.finish_reasons == ["length"]
    assert_as_before(deployment, before)


@pytest.mark.timeout(200)
def test_two_hundred_at_once_many_of_which_leave_early(deployment: Deployment) -> None:
    before = warm_up(deployment)
    rng = random.Random(3)
    jobs = [(make_ask(rng, 30), rng.choice([None, 0, 1, 5])) for _ in range(CONCURRENT)]
    with ThreadPoolExecutor(AT_ONCE) as clients:
        left = list(clients.map(lambda job: leave_after(deployment, *job), jobs))
    assert 0.5 * CONCURRENT < sum(left) < CONCURRENT
    assert_as_before(deployment, before)


def leave_after(deployment: Deployment, request: Ask, chunks: int | None) -> bool:
    """Read so many chunks, then hang up; None stays to the end. Returns whether it left."""
    if chunks is None:
        assert ask(deployment, request).finish_reasons == ["length"]
        return False
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=request.body(), timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(chunks):
            next(lines)
    return True
