"""The same bytes from real prefill and decode processes, whatever the settings: every pair of values of any two
settings appears in at least one deployment."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from pdserve import LLM, RequestOutput, SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config

AXES: dict[str, tuple[Any, ...]] = {
    "transport": ("nixl", "nixl over tcp", "shared_memory", "gloo", "grpc"),
    "worker": ("inproc", "process"),
    "order": ("block_major", "layer_major"),
    "block_size": (8, 32),
    "dtype": ("float32", "bfloat16"),
    "prefix_caching": (True, False),
    "depth": (1, 2),
}
CELLS = (
    ("nixl", "inproc", "block_major", 8, "float32", True, 1),
    ("nixl", "process", "layer_major", 32, "bfloat16", False, 2),
    ("nixl over tcp", "inproc", "block_major", 32, "bfloat16", True, 2),
    ("nixl over tcp", "process", "layer_major", 8, "float32", False, 1),
    ("shared_memory", "inproc", "layer_major", 8, "bfloat16", False, 1),
    ("shared_memory", "process", "block_major", 32, "float32", True, 2),
    ("gloo", "process", "block_major", 8, "bfloat16", False, 2),
    ("gloo", "inproc", "layer_major", 32, "float32", True, 1),
    ("grpc", "process", "layer_major", 32, "float32", True, 2),
    ("grpc", "inproc", "block_major", 8, "bfloat16", False, 1),
)


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    sampling: SamplingParams

    def fields(self) -> dict[str, Any]:
        s = self.sampling
        return {
            "temperature": s.temperature,
            "seed": s.seed,
            "max_tokens": s.max_tokens,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "repetition_penalty": s.repetition_penalty,
            "ignore_eos": True,
            "logprobs": 0,
        }


def _ask(length: int, seed: int, **sampling: Any) -> Ask:
    prompt = [(13 * i + 3) % VOCAB_SIZE for i in range(length)]
    return Ask(prompt, SamplingParams(seed=seed, max_tokens=12, ignore_eos=True, logprobs=True, **sampling))


ASKS = (
    _ask(33, 1, temperature=0.0),
    _ask(64, 2, temperature=0.9),
    _ask(150, 3, temperature=1.1, top_k=20, repetition_penalty=1.2),
    _ask(300, 4, temperature=0.7, top_p=0.9),
    _ask(300, 5, temperature=0.0, repetition_penalty=1.1),
)


def test_every_pair_of_values_is_covered() -> None:
    for first, second in combinations(range(len(AXES)), 2):
        wanted = set(product(tuple(AXES.values())[first], tuple(AXES.values())[second]))
        assert wanted == {(cell[first], cell[second]) for cell in CELLS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[RequestOutput]]:
    """What one engine in this process says, by dtype."""
    answers = {}
    for dtype in AXES["dtype"]:
        with LLM(checkpoint, device="cpu", dtype=dtype) as llm:
            answers[dtype] = llm.generate([ask.prompt for ask in ASKS], [ask.sampling for ask in ASKS])
    return answers


@pytest.fixture(params=CELLS, ids=lambda cell: "-".join(map(str, cell)).replace(" ", "_"))
def cell(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Deployment, str]]:
    transport, worker, order, block_size, dtype, prefix_caching, depth = request.param
    if transport == "nixl over tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    pool = {"prefix_caching": prefix_caching, "depth": depth}
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "routing": {"decode_local_below": 0},
        "dtype": dtype,
        "worker": worker,
        "kv": {
            "block_size": block_size,
            "num_blocks": 4096 // block_size,
            "order": order,
            "backends": [transport.split()[0]],
        },
        "pools": {"prefill": {**pool, "chunk_size": 64}, "decode": pool},
    }
    config = write_config(tmp_path / "cell.yaml", settings)
    with deployed(tmp_path / "serve.log", str(config)) as deployment:
        yield deployment, dtype


@pytest.mark.timeout(180)
def test_real_processes_say_what_one_engine_says(
    cell: tuple[Deployment, str], expected: dict[str, list[RequestOutput]]
) -> None:
    deployment, dtype = cell
    with ThreadPoolExecutor(len(ASKS)) as clients:
        for _ in range(2):
            answers = list(clients.map(lambda ask: _answer(deployment, ask), ASKS))
            for answer, wanted in zip(answers, expected[dtype], strict=True):
                assert answer["pdserve"]["mode"] == "disaggregated"
                choice = answer["choices"][0]
                assert choice["text"] == wanted.text
                assert tuple(choice["logprobs"]["token_logprobs"]) == wanted.logprobs


def _answer(deployment: Deployment, ask: Ask) -> dict[str, Any]:
    response = deployment.complete(ask.prompt, **ask.fields())
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = json.loads(response.text)
    return answer
