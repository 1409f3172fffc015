"""The chart's own commands, probes and test, as processes: requests go from prefill to decode pods, and none is lost
when a pod is deleted."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.chart import overlaid, values_file
from pdserve.cli.keys import digest_of
from tests.chart.prometheus import assert_scraped, scraping
from tests.chart.rules import OF_SCALER
from tests.pods import Pod, Pods, running

TEAM = {"Authorization": "Bearer sk-of-the-whole-team"}
VALUES = overlaid(
    values_file("cpu-demo"),
    {
        "decode": {"replicas": 2},
        "router": {"replicas": 2},
        "redis": {"mode": "bundled"},
        "config": {
            "tenants": [{"name": "team", "keys": [digest_of("sk-of-the-whole-team")], "concurrent_requests": 1}]
        },
    },
)
MAX_TOKENS = 700
"""A second or two of decoding: time enough to delete a pod meanwhile."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with running(VALUES, tmp_path_factory.mktemp("pods")) as pods:
        yield pods


def stream(release: Pods, prompt: list[int], headers: dict[str, str] | None = None) -> Iterator[dict[str, Any]]:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    with httpx.stream(
        "POST", f"{release.url}/v1/completions", json=body, headers=headers or release.headers, timeout=60
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def record(events: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [event["pdserve"] for event in events if "pdserve" in event]
    return dict(found)


def decoding_pod(release: Pods) -> str:
    """The one that writes, as soon as it says so."""
    found: list[str] = []

    def one_decodes() -> bool:
        found[:] = [name for name, count in _running(release).items() if count and "decode" in name]
        return len(found) == 1

    _eventually(one_decodes)
    return found[0]


def text(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event.get("choices", []))


def test_helm_test_passes_and_the_keyless_stay_out(release: Pods) -> None:
    pod = release.helm_test()
    assert pod.ended() == 0, pod.said()
    assert "passed: " in pod.said()
    assert "disaggregated" in pod.said()
    assert httpx.get(f"{release.url}/v1/models", timeout=10).status_code == 401


def test_a_real_prometheus_finds_every_metric_of_rules_and_dashboard(release: Pods, tmp_path: Path) -> None:
    admin = f"{release.router.ip}:8002"
    with scraping(admin, release.free_address(9090), tmp_path) as prometheus:
        assert_scraped(prometheus, lambda name: not name.startswith(OF_SCALER))
        roles = {result["metric"]["role"] for result in prometheus.query('pdserve_engine_info{state="ready"}')}
        assert roles == {"prefill", "decode"}
        assert prometheus.query("sum(pdserve_kv_blocks)")[0]["value"][1] != "0"


def test_a_deleted_decode_pod_loses_no_token(release: Pods) -> None:
    """It is unready at once and alive until it is empty; what it writes goes on at the other one."""
    prompt = [7 + 13 * n % 500 for n in range(80)]
    whole = list(stream(release, prompt))
    events = stream(release, prompt)
    begun = [next(events) for _ in range(5)]
    pod = release.pods[decoding_pod(release)]
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, events)
        pod.delete()
        assert pod.ended() == 0, pod.said()
        told = [*begun, *rest.result(60)]
    assert text(told) == text(whole)
    moves = record(told)["migrations"]  # one that takes too long on a busy machine is tried again
    assert {move["reason"] for move in moves} == {"drain"}
    assert moves[-1]["outcome"] == "ok"
    assert pod.probe("livenessProbe") is None
    assert '"event": "silent"' not in release.router.said(), "who leaves in order is under no suspicion"
    pod.start()
    pod.until("startupProbe", 200)
    _until_found(release, pod.name)


def test_two_routers_share_a_tenants_limit_and_an_idempotency_key(release: Pods) -> None:
    """They find the engines by name, each for itself, and meet in Redis."""
    other = release.pods["pdserve-router-1"]
    for router in (release.router, other):
        _eventually(lambda router=router: "pdserve_other_routers 1.0" in _metrics(router))  # type: ignore[misc]

    events = stream(release, [19 + 23 * n % 500 for n in range(60)], TEAM)
    next(events)
    refused = _ask(other, TEAM)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    list(events)
    _eventually(lambda: _ask(other, TEAM).status_code == 200)

    keyed = {**release.headers, "Idempotency-Key": "once"}
    _eventually(lambda: _ask(release.router, keyed).status_code == 200)  # until it is certain who has which key
    first, again = _ask(release.router, keyed), _ask(other, keyed)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json() == first.json()


def _ask(router: Pod, headers: dict[str, str]) -> httpx.Response:
    body = {"prompt": [1, 2, 3], "max_tokens": 4}
    return httpx.post(f"http://{router.ip}:8000/v1/completions", json=body, headers=headers, timeout=60)


def _metrics(router: Pod) -> str:
    return httpx.get(f"http://{router.ip}:8002/metrics", timeout=10).text


def _eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_router_that_ends_is_unready_first_and_finishes_what_it_serves(release: Pods) -> None:
    events = stream(release, [11 + 17 * n % 500 for n in range(70)])
    begun = [next(events) for _ in range(3)]
    release.router.delete()
    release.router.until("readinessProbe", 503)
    assert release.router.probe("livenessProbe") == 200
    told = [*begun, *events]
    assert record(told)["failed_attempts"] == []
    assert told[-1]["choices"][0]["finish_reason"] == "length" or "usage" in told[-1]
    assert release.router.ended() == 0, release.router.said()


def _engines(release: Pods) -> list[dict[str, Any]]:
    answer = httpx.get(f"http://{release.router.ip}:8002/admin/engines", headers=release.headers, timeout=10)
    return list(answer.json()["engines"])


def _running(release: Pods) -> dict[str, int]:
    return {engine["id"]: engine["running"] for engine in _engines(release)}


def _until_found(release: Pods, name: str) -> None:
    _eventually(lambda: any(engine["id"] == name and engine["state"] == "ready" for engine in _engines(release)))
