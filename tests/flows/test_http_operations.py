"""What operators and probes rely on: readiness, draining, keys, metrics, cancellation."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.cluster import StepModel
from pdserve.core.request import Request
from pdserve.gateway.auth import TenantKeys
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.telemetry.record import RequestRecord
from tests import tiny_tokenizers as tiny
from tests.scripted_generator import EPOCH, HANG, HttpServer, ScriptedGenerator, Step, http_server, speak

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny.byte_level(tmp_path)


@pytest.fixture
def generator(directory: Path) -> ScriptedGenerator:
    return ScriptedGenerator(speak(FastTokenizer.from_file(str(directory / "tokenizer.json")), "fine"))


@pytest.fixture
def server(generator: ScriptedGenerator, directory: Path) -> Iterator[HttpServer]:
    with http_server(generator, Tokenizer.load(directory)) as running:
        yield running


@pytest.fixture
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as http:
        yield http


def hang_after_first(generator: ScriptedGenerator) -> None:
    """One token, then nothing until the request is cancelled."""
    whole = generator.script

    def script(request: Request) -> list[Step]:
        return [whole(request)[0], HANG]

    generator.script = script


def test_readiness_follows_the_engines_and_liveness_does_not(
    client: httpx.Client, generator: ScriptedGenerator
) -> None:
    assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [200, 200, 200]
    generator.ready = False
    assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [200, 503, 503]
    assert client.get("/ready").json()["error"]["code"] == "unavailable"


def test_draining_finishes_what_runs_and_refuses_what_comes(
    client: httpx.Client, server: HttpServer, generator: ScriptedGenerator
) -> None:
    release = threading.Event()
    whole = generator.script

    def script(request: Request) -> list[Step]:
        first, *others = whole(request)
        return [first, release, *others]

    generator.script = script
    with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        server.drain()
        refused = httpx.post(server.url + CHAT, json=HELLO, timeout=10)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(server.url + "/ready").status_code == 503
        assert httpx.get(server.url + "/live").status_code == 200
        release.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_gateway_that_leaves_answers_and_has_clients_go_elsewhere(client: httpx.Client, server: HttpServer) -> None:
    assert "connection" not in client.get("/live").headers
    server.leave()
    assert client.get("/ready").status_code == 503
    answer = client.post(CHAT, json=HELLO)
    assert answer.status_code == 200
    assert answer.headers["connection"] == "close"


def test_what_is_refused_is_not_executed_though_it_has_a_key(
    client: httpx.Client, generator: ScriptedGenerator
) -> None:
    for path, body in ((CHAT, HELLO), ("/v1/completions", {"prompt": "x"})):
        options = {"stream_options": {"include_usage": True}}
        refused = client.post(path, json=body | options, headers={"idempotency-key": f"key of {path}"})
        assert refused.status_code == 400
    assert client.post(CHAT, json=HELLO).status_code == 200
    assert len(generator.requests) == 1


def test_a_request_is_found_by_whatever_its_client_called_it(client: httpx.Client, server: HttpServer) -> None:
    client.post(CHAT, json=HELLO, headers={"x-request-id": "team/job-1"})
    assert client.get(f"{server.admin_url}/admin/requests/team%2Fjob-1").status_code == 200


def test_engines_are_listed_under_the_agreed_names(client: httpx.Client, server: HttpServer) -> None:
    engines = client.get(f"{server.admin_url}/admin/engines").json()["engines"]
    assert engines[0] == {
        "id": "prefill-0",
        "role": "prefill",
        "epoch": str(EPOCH),
        "pid": 4242,
        "address": "127.0.0.1:9",
        "state": "ready",
        "running": 2,
        "waiting": 1,
        "kv_blocks": {"total": 10, "free": 4, "used": 3, "leased": 2, "quarantined": 1},
    }
    assert engines[1]["kv_blocks"]["total"] == 0


def test_lost_links_are_told_by_engine(client: httpx.Client, server: HttpServer) -> None:
    engines = client.get(f"{server.admin_url}/admin/links").json()["engines"]
    assert engines[0] == {"id": "prefill-0", "lost": []}


def test_steps_are_told_by_engine_with_what_it_can_take_on(client: httpx.Client, server: HttpServer) -> None:
    engines = client.get(f"{server.admin_url}/admin/steps").json()["engines"]
    assert engines[0] == {
        "id": "prefill-0",
        "role": "prefill",
        "capacity": None,
        "steps": [],
        "model": asdict(StepModel()),
    }


def test_the_latest_requests_are_told_in_order_of_arrival(client: httpx.Client, server: HttpServer) -> None:
    for name in ("one", "two", "three"):
        client.post(CHAT, json=HELLO, headers={"x-request-id": name})
    told = client.get(f"{server.admin_url}/admin/requests?latest=2").json()["requests"]
    assert [request["client_request_id"] for request in told] == ["two", "three"]
    assert told[-1] == client.get(f"{server.admin_url}/admin/requests/three").json()
    refused = client.get(f"{server.admin_url}/admin/requests?latest=0")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")


def test_metrics_tell_what_happened(client: httpx.Client, server: HttpServer) -> None:
    assert client.post(CHAT, json=HELLO).status_code == 200
    assert client.post(CHAT, json=HELLO | {"n": 5}).status_code == 400
    lines = client.get(f"{server.admin_url}/metrics").text.splitlines()
    for line in (
        'pdserve_requests_total{endpoint="chat_completions",status="ok"} 1.0',
        'pdserve_rejections_total{reason="unsupported"} 1.0',
        "pdserve_time_to_first_token_seconds_count 1.0",
        "pdserve_inter_token_latency_seconds_count 3.0",
        "pdserve_e2e_request_latency_seconds_count 1.0",
        "pdserve_output_tokens_total 4.0",
        "pdserve_cached_prompt_tokens_total 3.0",
        'pdserve_kv_blocks{engine="prefill-0",state="leased"} 2.0',
        'pdserve_engine_running_sequences{engine="prefill-0"} 2.0',
        'pdserve_engine_info{engine="decode-0",role="decode",state="ready"} 1.0',
    ):
        assert line in lines


def test_client_that_leaves_a_stream_cancels_the_request(
    client: httpx.Client, server: HttpServer, generator: ScriptedGenerator
) -> None:
    hang_after_first(generator)
    with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
        lines = response.iter_lines()  # dropping the iterator would close the connection
        assert "assistant" in next(lines)
        assert not generator.closed.wait(0.2)
    assert generator.closed.wait(10)
    assert 'status="cancelled"} 1.0' in client.get(f"{server.admin_url}/metrics").text


def test_client_that_leaves_while_waiting_cancels_the_request(server: HttpServer, generator: ScriptedGenerator) -> None:
    hang_after_first(generator)
    body = json.dumps(HELLO).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=5) as connection:
        connection.sendall(head.encode() + body)
        assert generator.started.wait(5)
    assert generator.closed.wait(10)


def test_client_that_reads_nothing_is_cut_off(directory: Path, generator: ScriptedGenerator) -> None:
    line = speak(FastTokenizer.from_file(str(directory / "tokenizer.json")), "x" * 300, end=None)
    generator.script = lambda request: [*list(line(request)) * 200, HANG]
    settings = GatewaySettings(send_timeout=0.5)
    # Were the connection left, the server would take its whole grace to end, for which http_server does not wait.
    with socket.socket() as connection, http_server(generator, Tokenizer.load(directory), settings, grace=60) as server:
        body = json.dumps(HELLO | {"stream": True, "logprobs": True}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        address = urlsplit(server.url)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((address.hostname, address.port))
        connection.sendall(head.encode() + body)
        assert generator.closed.wait(20)


def test_request_over_its_time_ends_with_504(directory: Path, generator: ScriptedGenerator) -> None:
    hang_after_first(generator)
    with http_server(generator, Tokenizer.load(directory), GatewaySettings(request_timeout=0.2)) as server:
        response = httpx.post(server.url + CHAT, json=HELLO, timeout=10)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert generator.closed.is_set()


@pytest.mark.parametrize("path", ["/admin/engines/p0/restart", "/admin/requests/r/move", "/admin/pairs/a/b/check"])
def test_web_pages_give_no_orders_unless_they_bring_a_key(
    directory: Path, generator: ScriptedGenerator, path: str
) -> None:
    page = {"origin": "https://elsewhere.example"}
    with http_server(generator, Tokenizer.load(directory)) as server:
        answers = [httpx.post(server.admin_url + path, headers=headers) for headers in ({}, page)]
        assert answers[0].status_code != 403
        assert (answers[1].status_code, answers[1].json()["error"]["code"]) == (403, "forbidden")
        assert httpx.get(server.admin_url + "/admin/engines", headers=page).status_code == 200
    with http_server(generator, Tokenizer.load(directory), GatewaySettings(api_keys=("sk-one",))) as server:
        answer = httpx.post(server.admin_url + path, headers={**page, "authorization": "Bearer sk-one"})
        assert answer.status_code == answers[0].status_code


def test_keys_guard_all_but_the_open_paths(directory: Path, generator: ScriptedGenerator) -> None:
    settings = GatewaySettings(api_keys=("sk-one", "sk-two"))
    with http_server(generator, Tokenizer.load(directory), settings) as server:
        public = [server.url + path for path in ("/v1/models", "/openapi.json", "/nothing", "/live/../v1/models")]
        admin = [server.admin_url + path for path in ("/admin/engines", "/openapi.json", "/nothing")]
        for url in (*public, *admin):
            for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": "sk-one"}):
                refused = httpx.get(url, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        for path in ("/live", "/ready", "/health"):
            assert httpx.get(server.url + path).status_code == 200
            assert httpx.get(server.admin_url + path).status_code == 200
        assert httpx.get(server.admin_url + "/metrics").status_code == 200
        engines = httpx.get(server.admin_url + "/admin/engines", headers={"authorization": "Bearer sk-two"})
        assert engines.status_code == 200
        for key in ("sk-one", "sk-two", "sk-one"):
            accepted = httpx.post(server.url + CHAT, json=HELLO, headers={"authorization": f"bearer {key}"})
            assert accepted.status_code == 200
    one, two, again = (request.salt for request in generator.requests)
    assert one == again != two, "prefix caches are apart by key"
    assert b"sk-one" not in one
    assert one != b""


def test_a_tenants_key_opens_the_api_and_not_the_admin_port(directory: Path, generator: ScriptedGenerator) -> None:
    tenants = (TenantKeys(name="search", digests=(sha256(b"sk-tenant").digest(),)),)
    key, operators = {"authorization": "Bearer sk-tenant"}, {"authorization": "Bearer sk-ops"}
    settings = GatewaySettings(api_keys=("sk-ops",), tenants=tenants)
    with http_server(generator, Tokenizer.load(directory), settings) as server:
        body = {**HELLO, "priority": 3}
        urgent = {**key, "x-request-priority": "-5", "x-request-timeout": "7.5"}
        assert httpx.post(server.url + CHAT, json=body, headers=key).status_code == 200
        assert httpx.post(server.url + CHAT, json=HELLO, headers=urgent).status_code == 200
        assert httpx.get(server.admin_url + "/admin/engines", headers=key).status_code == 401
        assert httpx.get(server.admin_url + "/admin/engines", headers=operators).status_code == 200
        assert httpx.post(server.url + CHAT, json=HELLO).status_code == 401
    first, second = generator.requests
    assert (first.tenant, first.priority, second.priority) == ("search", 3, 0), "no more urgent than it may be"
    assert second.timeout == 7.5


def test_operators_can_ask_what_became_of_a_request(
    client: httpx.Client, server: HttpServer, generator: ScriptedGenerator
) -> None:
    answer = client.post(CHAT, json=HELLO, headers={"x-request-id": "mine"})
    own = answer.json()["pdserve"]["request_id"]
    for name in (own, own.partition("-")[2], "mine", "last"):
        told = client.get(f"{server.admin_url}/admin/requests/{name}").json()
        assert (told["request_id"], told["status"], told["endpoint"]) == (own, "ok", "chat_completions")
    assert list(told["stamps"])[:3] == ["arrived", "read", "tokenized"]
    assert told["prompt_tokens"] == len(generator.requests[0].prompt_token_ids)
    unknown = client.get(f"{server.admin_url}/admin/requests/chatcmpl-0")
    assert unknown.status_code == 404
    assert "'chatcmpl-0' is not among them" in unknown.json()["error"]["message"]


def test_who_is_told_of_ends_gets_the_record_complete_and_with_the_callers_trace(
    client: httpx.Client, server: HttpServer
) -> None:
    ended: list[RequestRecord] = []
    server.gateway.tell_ends(ended.append)
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert client.post(CHAT, json=HELLO, headers={"traceparent": traceparent}).status_code == 200
    [record] = ended
    assert (record.status, record.traceparent, record.output_tokens) == ("ok", traceparent, 4)
    assert dict(record.stamps)["closed"] == 1.0


def test_a_running_request_is_told_of_as_running_and_a_cancelled_one_as_cancelled(
    client: httpx.Client, server: HttpServer, generator: ScriptedGenerator
) -> None:
    hang_after_first(generator)

    def status() -> object:
        return httpx.get(f"{server.admin_url}/admin/requests/last").json()["status"]

    with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        assert status() == "running"
    assert generator.closed.wait(10)
    assert status() == "cancelled"


def test_what_is_kept_and_logged_holds_nothing_of_what_was_said(
    client: httpx.Client, server: HttpServer, capfd: pytest.CaptureFixture[str]
) -> None:
    message = {"role": "user", "content": "whisper"}
    assert client.post(CHAT, json={"messages": [message]}).status_code == 200
    kept = client.get(f"{server.admin_url}/admin/requests/last").text
    logged = "".join(capfd.readouterr())
    assert '"status"' in kept
    assert '"request"' in logged
    for text in (kept, logged):
        assert "whisper" not in text
        assert "fine" not in text


@pytest.mark.parametrize("path", ["/metrics", "/admin/engines", "/admin/requests/last"])
def test_the_public_port_shows_operators_pages_to_nobody(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", CHAT, "/v1/completions", "/v1/models"])
def test_the_admin_port_serves_no_clients(server: HttpServer, path: str) -> None:
    assert httpx.get(server.admin_url + path).status_code == 404
    assert httpx.post(server.admin_url + path, json=HELLO).status_code == 404


def test_openapi_describes_the_endpoints(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, "/v1/completions", "/v1/models", "/live"} <= paths.keys()
    assert "requestBody" in paths[CHAT]["post"]


def test_shutdown_cancels_what_still_runs_after_the_grace(directory: Path, generator: ScriptedGenerator) -> None:
    hang_after_first(generator)
    with ExitStack() as client, http_server(generator, Tokenizer.load(directory), grace=0.5) as server:
        http = client.enter_context(httpx.Client(base_url=server.url, timeout=10))
        response = client.enter_context(http.stream("POST", CHAT, json=HELLO | {"stream": True}))
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        assert not generator.closed.is_set()
    assert generator.closed.is_set()


def test_chat_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "/v1/chat/completions" in page.text
    assert "://" not in page.text
