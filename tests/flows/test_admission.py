"""Tenants and admission of a real deployment: keys, limits, caches that are apart, and what operators see of it."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import grpc
import httpx
import pytest

from pdserve.gateway.serve import bind
from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import InferenceStub
from tests.checkpoints import make_checkpoint
from tests.deployment import Deployment, deployed, write_config

KEYS = {name: f"pd-key-of-{name}-0123456789" for name in ("alone", "one", "other", "limited")}
with bind("127.0.0.1", 0) as listener:
    GRPC_PORT = listener.getsockname()[1]
PROMPT = [7 + i % 50 for i in range(160)]


def tenant(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "keys": [f"sha256:{sha256(KEYS[name].encode()).hexdigest()}"], **settings}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("admission")
    settings = {
        "model": str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")),
        "served_model_name": "tiny",
        "device": "cpu",
        "kv": {"memory": "8MiB"},
        # Generous: this is about who may enter, on a machine that may be busy with other things.
        "slo": {"ttft": 120, "tpot": 30},
        "tenants": [
            tenant("alone"),
            tenant("one", share_group="both"),
            tenant("other", share_group="both"),
            tenant("limited", requests_per_second=0.001, burst=2),
        ],
    }
    path = write_config(folder / "cluster.yaml", settings)
    with deployed(folder / "log", str(path), "--grpc-port", str(GRPC_PORT)) as running:
        yield running


def ask(deployment: Deployment, name: str, prompt: list[int], **headers: str) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    headers["authorization"] = f"Bearer {KEYS[name]}"
    return httpx.post(f"{deployment.url}/v1/completions", json=body, headers=headers, timeout=60)


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_nobody_enters_without_a_key_of_a_tenant(deployment: Deployment) -> None:
    refused = deployment.complete(PROMPT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    wrong = httpx.get(f"{deployment.url}/v1/models", headers={"authorization": "Bearer pd-guessed"})
    assert wrong.status_code == 401


def test_no_cached_token_crosses_tenants_unless_they_share_a_group(deployment: Deployment) -> None:
    assert cached(ask(deployment, "one", PROMPT)) == 0
    assert cached(ask(deployment, "one", PROMPT)) > 0
    assert cached(ask(deployment, "alone", PROMPT)) == 0
    assert cached(ask(deployment, "other", PROMPT)) > 0
    assert cached(ask(deployment, "alone", PROMPT)) > 0


async def test_a_rate_is_kept_to_over_http_and_grpc(deployment: Deployment) -> None:
    for _ in range(2):
        assert ask(deployment, "limited", PROMPT).status_code == 200
    refused = ask(deployment, "limited", PROMPT)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert int(refused.headers["retry-after"]) > 100
    assert ask(deployment, "alone", PROMPT).status_code == 200
    async with grpc.aio.insecure_channel(f"127.0.0.1:{GRPC_PORT}") as channel:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
        call = InferenceStub(channel).Generate(
            request, metadata=(("authorization", f"Bearer {KEYS['limited']}"),), timeout=30
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata() or ())


def test_operators_see_how_requests_came_in_and_what_they_took(deployment: Deployment) -> None:
    answer = ask(deployment, "alone", [3 + i % 70 for i in range(100)], **{"x-request-priority": "4"})
    admission = answer.json()["pdserve"]["admission"]
    assert (admission["tenant"], admission["priority"], admission["rejection"]) == ("alone", 4, None)
    metrics = httpx.get(f"{deployment.admin_url}/metrics").text
    for line in (
        "pdserve_admission_wait_seconds_count",
        'pdserve_tenant_prefill_seconds_total{tenant="alone"}',
        'pdserve_tenant_kv_block_seconds_total{tenant="alone"}',
    ):
        assert line in metrics


def test_what_is_no_priority_and_no_timeout_is_refused(deployment: Deployment) -> None:
    for headers, param in (({"x-request-priority": "soon"}, "x-request-priority"), ({"x-request-timeout": "-1"}, None)):
        refused = ask(deployment, "alone", PROMPT, **headers)
        assert refused.status_code == 400
        assert param is None or refused.json()["error"]["param"] == param
