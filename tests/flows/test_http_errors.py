"""Whatever comes in, every error leaves in one envelope, and the server goes on."""

import gzip
import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineDied,
    Overloaded,
    PdserveError,
    TransferTimeout,
    Unavailable,
)
from pdserve.gateway.serve import bind
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from tests import tiny_tokenizers as tiny
from tests.scripted_generator import HttpServer, ScriptedGenerator, Step, http_server, speak

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
SAY = {"prompt": "say"}
LIMIT = 100_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HttpServer, ScriptedGenerator, httpx.Client]]:
    directory = tiny.byte_level(tmp_path_factory.mktemp("model"))
    generator = ScriptedGenerator(speak(FastTokenizer.from_file(str(directory / "tokenizer.json")), "fine"))
    settings = GatewaySettings(max_body_bytes=LIMIT)
    with (
        http_server(generator, Tokenizer.load(directory), settings) as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        yield server, generator, client


@pytest.fixture
def client(served: tuple[HttpServer, ScriptedGenerator, httpx.Client]) -> Iterator[httpx.Client]:
    yield served[2]
    assert served[2].post(COMPLETIONS, json=SAY).status_code == 200, "the server still answers"


@pytest.fixture
def generator(served: tuple[HttpServer, ScriptedGenerator, httpx.Client]) -> Iterator[ScriptedGenerator]:
    script = served[1].script
    yield served[1]
    served[1].script = script


def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    """The envelope's content, with its form checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, str | None] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == {429: "rate_limit_error", 401: "authentication_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return error


BAD_FIELDS = [
    ("temperature", -1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 101),
    ("top_p", 0),
    ("top_p", -0.1),
    ("top_p", 2),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", 10**12),
    ("max_tokens", "5"),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("seed", -1),
    ("seed", 2**63),
    ("stop", ""),
    ("stop", ["x"] * 17),
    ("stop", "x" * 1025),
    ("stop", 5),
    ("stop", [5]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [10**6]),
    ("stop_token_ids", ["a"]),
    ("ignore_eos", "yes"),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": 1}),
    ("stream_options", {"include_usage": True}),
    ("model", 5),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_value_is_refused_and_named(client: httpx.Client, name: str, value: object) -> None:
    error = error_of(client.post(COMPLETIONS, json=SAY | {"max_tokens": 16} | {name: value}), 400)
    assert str(error["param"]).split(".")[0].split("[")[0] == name
    assert name in str(error["message"])
    assert error["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", 0),
        ("n", True),
        ("best_of", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 2),
        ("echo", True),
        ("suffix", "x"),
        ("chat_template", "{{ x }}"),
        ("guided_json", {}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_unsupported_parameter_is_refused_and_named(client: httpx.Client, path: str, name: str, value: object) -> None:
    error = error_of(client.post(path, json=HELLO | SAY | {name: value}), 400)
    assert (error["code"], error["param"]) == ("unsupported", name)


def test_neutral_and_null_parameters_are_accepted(client: httpx.Client) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": None}
    neutral |= {"response_format": {"type": "text"}, "temperature": None, "stop": None, "top_k": -1, "seed": 0}
    assert client.post(CHAT, json=HELLO | neutral).status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [5],
        [{}],
        [{"content": "x"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    ],
)
def test_bad_messages_are_refused(client: httpx.Client, messages: object) -> None:
    error = error_of(client.post(CHAT, json={"messages": messages}), 400)
    assert str(error["param"]).startswith("messages")


@pytest.mark.parametrize(
    "prompt",
    [None, 5, "", [], [""], [[]], [-1], [tiny.MODEL.vocab_size], [1.5], [True], [[1], [2]], ["a", "b"], [{}], {}],
)
def test_bad_prompt_is_refused(client: httpx.Client, prompt: object) -> None:
    assert error_of(client.post(COMPLETIONS, json={"prompt": prompt}), 400)["param"] == "prompt"


def test_prompt_must_leave_room_in_the_context(client: httpx.Client) -> None:
    longest = [0] * (tiny.MODEL.max_model_len - 4)
    assert client.post(COMPLETIONS, json={"prompt": longest, "max_tokens": 4}).status_code == 200
    error = error_of(client.post(COMPLETIONS, json={"prompt": longest, "max_tokens": 5}), 400)
    assert error["param"] == "max_tokens"
    assert error_of(client.post(COMPLETIONS, json={"prompt": [*longest, *[0] * 4]}), 400)["param"] == "prompt"
    chat = {"messages": [{"role": "user", "content": "x" * tiny.MODEL.max_model_len}]}
    assert error_of(client.post(CHAT, json=chat), 400)["param"] == "messages"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"\xef\xbb\xbf{}",
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 50_000 + b"}",
        gzip.compress(b'{"prompt": "x"}'),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_body_that_is_no_json_object_is_refused(client: httpx.Client, body: bytes) -> None:
    error_of(client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400)


def test_other_media_type_is_refused_with_advice(client: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        error = error_of(client.post(COMPLETIONS, content=json.dumps(SAY), headers=headers), 400)
        assert "application/json" in str(error["message"])


def test_body_over_the_limit_is_refused_and_counted(
    client: httpx.Client, served: tuple[HttpServer, ScriptedGenerator, httpx.Client]
) -> None:
    body = json.dumps({"prompt": "x" * LIMIT}).encode()
    headers = {"content-type": "application/json"}
    assert error_of(client.post(COMPLETIONS, content=body, headers=headers), 413)["code"] == "too_large"
    chunked = (body[start : start + 9000] for start in range(0, len(body), 9000))
    assert error_of(client.post(COMPLETIONS, content=chunked, headers=headers), 413)["code"] == "too_large"
    registry = served[0].gateway.metrics.registry
    assert registry.get_sample_value("pdserve_rejections_total", {"reason": "too_large"}) == 2


def test_headers_over_the_limit_are_refused(client: httpx.Client) -> None:
    error_of(client.get("/live", headers={"x-long": "x" * 70_000}), 431)


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/models/", "/v1/models/../../etc/passwd", "/docs", "/V1/models"]
)
def test_unknown_path_is_404(client: httpx.Client, path: str) -> None:
    error_of(client.get(path), 404)


def test_wrong_method_is_405_and_says_what_is_allowed(client: httpx.Client) -> None:
    response = client.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    error_of(client.post("/ready"), 405)


def test_unknown_model_is_404(client: httpx.Client) -> None:
    error = error_of(client.post(CHAT, json=HELLO | {"model": "../other"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("raised", "status", "retry_after"),
    [
        (Overloaded("full", retry_after=7), 429, "7"),
        (Unavailable("no decode engine"), 503, "1"),
        (EngineDied("decode-0 is gone"), 503, "1"),
        (TransferTimeout("10 s passed"), 503, "1"),
        (DeadlineExceeded("late"), 504, None),
        (PdserveError("odd"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_any_token_has_a_status(
    client: httpx.Client,
    generator: ScriptedGenerator,
    raised: PdserveError,
    status: int,
    retry_after: str | None,
    stream: bool,
) -> None:
    fine = generator.script
    generator.script = lambda request: [raised]
    response = client.post(CHAT, json=HELLO | {"stream": stream})
    generator.script = fine
    assert error_of(response, status)["code"] == raised.code
    assert response.headers.get("retry-after") == retry_after


@pytest.mark.parametrize("stream", [False, True])
def test_defect_is_a_500_that_tells_nothing(client: httpx.Client, generator: ScriptedGenerator, stream: bool) -> None:
    fine = generator.script
    generator.script = lambda request: [RuntimeError("secret at 0x7f00")]
    response = client.post(CHAT, json=HELLO | {"stream": stream})
    generator.script = fine
    assert "secret" not in str(error_of(response, 500))


def test_defect_in_the_middle_of_a_stream_is_the_last_event(client: httpx.Client, generator: ScriptedGenerator) -> None:
    fine = generator.script

    def script(request: object) -> list[Step]:
        return [*fine(generator.requests[-1])[:2], RuntimeError("secret")]

    generator.script = script
    response = client.post(CHAT, json=HELLO | {"stream": True})
    generator.script = fine
    assert response.status_code == 200
    events = [event.removeprefix("data: ") for event in response.text.strip().split("\n\n")]
    assert json.loads(events[-1])["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "[DONE]" not in events


def test_request_id_of_the_client_comes_back_unless_it_is_dangerous(client: httpx.Client) -> None:
    assert client.get("/live", headers={"x-request-id": "trace-1"}).headers["x-request-id"] == "trace-1"
    for unfit in ("a b", "x" * 200, "é".encode("latin-1")):
        returned = client.get(
            "/live", headers=[(b"x-request-id", unfit if isinstance(unfit, bytes) else unfit.encode())]
        )
        assert len(returned.headers["x-request-id"]) == 32


def test_port_in_use_is_a_clear_error() -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        with pytest.raises(ConfigError, match="in use"):
            bind("127.0.0.1", owner.getsockname()[1])
