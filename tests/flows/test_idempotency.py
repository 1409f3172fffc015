"""A client that asks again with the same idempotency key gets the one answer, over HTTP and gRPC."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import Overloaded
from pdserve.core.request import Request
from pdserve.gateway.auth import TenantKeys
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from tests import tiny_tokenizers as tiny
from tests.scripted_generator import HttpServer, ScriptedGenerator, Step, http_server, speak

SAY = {"prompt": "say", "logprobs": 0}
KEYS = {name: f"key-of-{name}-0000000" for name in ("search", "batch")}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HttpServer, ScriptedGenerator]]:
    directory = tiny.byte_level(tmp_path_factory.mktemp("model"))
    generator = ScriptedGenerator(speak(FastTokenizer.from_file(str(directory / "tokenizer.json")), "fine, thank you"))
    tenants = tuple(TenantKeys(name=n, digests=(sha256(k.encode()).digest(),)) for n, k in KEYS.items())
    with http_server(generator, Tokenizer.load(directory), GatewaySettings(tenants=tenants)) as server:
        yield server, generator


def post(server: HttpServer, key: str, body: dict[str, Any], tenant: str = "search", **more: Any) -> httpx.Response:
    headers = {"Idempotency-Key": key, "Authorization": f"Bearer {KEYS[tenant]}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, **{"timeout": 20, **more})


def executed(generator: ScriptedGenerator, action: Any) -> tuple[Any, list[Request]]:
    before = len(generator.requests)
    return action(), generator.requests[before:]


def test_the_same_request_again_is_answered_alike_without_being_executed(
    served: tuple[HttpServer, ScriptedGenerator],
) -> None:
    server, generator = served
    (first, second), requests = executed(generator, lambda: (post(server, "a", SAY), post(server, "a", SAY)))
    assert len(requests) == 1
    assert first.json() == second.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"


def test_a_stream_is_told_again_with_the_same_text_and_end(served: tuple[HttpServer, ScriptedGenerator]) -> None:
    server, generator = served
    body = SAY | {"stream": True}
    (first, second), requests = executed(generator, lambda: [text_of(post(server, "s", body)) for _ in range(2)])
    assert len(requests) == 1
    assert first == second
    assert first[0] == "fine, thank you"


def text_of(response: httpx.Response) -> tuple[str, str, list[float]]:
    """Text, id and log probabilities of a stream."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    choices = [chunk["choices"][0] for chunk in chunks]
    logprobs = [p for choice in choices if choice["logprobs"] for p in choice["logprobs"]["token_logprobs"]]
    return "".join(choice["text"] for choice in choices), chunks[0]["id"], logprobs


def test_a_retry_while_it_runs_attaches_though_the_first_client_has_gone(
    served: tuple[HttpServer, ScriptedGenerator],
) -> None:
    server, generator = served
    script, go_on = generator.script, threading.Event()
    generator.script = lambda request: [*script(request)[:2], go_on, *script(request)[2:]]
    generator.started.clear()
    try:
        with pytest.raises(httpx.ReadTimeout):
            post(server, "r", SAY, timeout=0.5)
        assert generator.started.wait(10)
        with ThreadPoolExecutor(2) as pool:
            retries = [pool.submit(post, server, "r", SAY) for _ in range(2)]
            go_on.set()
            answers = [retry.result().json() for retry in retries]
    finally:
        generator.script = script
    assert answers[0] == answers[1]
    assert answers[0]["choices"][0]["text"] == "fine, thank you"
    assert sum(f"cmpl-{r.id[5:]}" == answers[0]["id"] for r in generator.requests) == 1


def test_another_body_under_the_same_key_is_refused(served: tuple[HttpServer, ScriptedGenerator]) -> None:
    server, generator = served
    post(server, "b", SAY)
    answer, requests = executed(generator, lambda: post(server, "b", SAY | {"max_tokens": 3}))
    assert not requests
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "idempotency_key_reused"


def test_tenants_have_keys_of_their_own(served: tuple[HttpServer, ScriptedGenerator]) -> None:
    server, generator = served
    _, requests = executed(generator, lambda: [post(server, "t", SAY, tenant) for tenant in KEYS])
    assert [request.tenant for request in requests] == list(KEYS)


def test_what_failed_may_be_tried_again_and_draws_the_same_seed(served: tuple[HttpServer, ScriptedGenerator]) -> None:
    server, generator = served
    script = generator.script
    refused: list[Step] = [Overloaded("too much", retry_after=1)]
    generator.script = lambda request: refused
    first, requests = executed(generator, lambda: post(server, "f", SAY))
    generator.script = script
    second, again = executed(generator, lambda: post(server, "f", SAY))
    assert (first.status_code, second.status_code) == (429, 200)
    assert requests[0].sampling.seed == again[0].sampling.seed
    _, others = executed(generator, lambda: post(server, "g", SAY))
    assert others[0].sampling.seed != again[0].sampling.seed


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_that_is_none_is_refused(served: tuple[HttpServer, ScriptedGenerator], key: str) -> None:
    answer = post(served[0], key, SAY)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "idempotency-key"
