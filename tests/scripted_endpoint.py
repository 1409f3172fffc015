"""An OpenAI endpoint that answers by script: known delays, known counts, chosen failures."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

OVERHEAD = 7
TOKENS_PER_WORD = 2


@dataclass
class Script:
    """What the endpoint does and what it saw. A prompt is OVERHEAD + TOKENS_PER_WORD × words tokens.

    Answers have max_tokens words, the first after `first` seconds, each other `gap` later."""

    first: float = 0.0
    gap: float = 0.0
    usage: bool = True
    longest_answer: int | None = None
    status: int = 200
    break_after: int | None = None
    error_after: int | None = None
    garbage: bool = False
    models: tuple[str, ...] = ("scripted",)
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    hung_up: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.keys.append(headers.get("authorization"))
        if scope["path"] == "/v1/models":
            await _json(send, 200, {"data": [{"id": name} for name in self.models]})
            return
        body = json.loads(await _body(receive)) | {"path": scope["path"]}
        self.seen.append(body)
        if self.status != 200 and body["max_tokens"] > 1:
            await _json(send, self.status, {"error": {"message": "no", "type": "x", "code": "scripted"}})
            return
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._stream(body, receive, send, headers["x-request-id"])
        finally:
            self.at_once -= 1

    async def _stream(self, body: dict[str, Any], receive: Receive, send: Send, name: str) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        start = [(b"content-type", b"text/event-stream"), (b"x-request-id", f"server-{name}".encode())]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        body["max_tokens"] = min(body["max_tokens"], self.longest_answer or body["max_tokens"])
        chat = body["path"].endswith("chat/completions")
        try:
            for index in range(body["max_tokens"]):
                await asyncio.sleep(self.gap if index else self.first)
                if gone.done():
                    self.hung_up += 1
                    return
                if index == self.break_after and body["max_tokens"] > 1:
                    raise ConnectionAbortedError("scripted")
                if index == self.error_after and body["max_tokens"] > 1:
                    await _event(send, {"error": {"message": "no", "code": "engine_died"}})
                    return
                choice = {"delta": {"content": f"w{index} "}} if chat else {"text": f"w{index} "}
                await _event(send, ["no"] if self.garbage and body["max_tokens"] > 1 else {"choices": [choice]})
            await _event(send, {"choices": [{"delta": {}, "finish_reason": "length"}]})
            if self.usage:
                counts = {"prompt_tokens": _prompt_tokens(body), "completion_tokens": body["max_tokens"]}
                await _event(send, {"choices": [], "usage": counts})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        finally:
            gone.cancel()


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The script's URL while it is served by a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(script, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()


def unused_port() -> int:
    """A port nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _prompt_tokens(body: dict[str, Any]) -> int:
    texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
    return OVERHEAD + TOKENS_PER_WORD * sum(len(text.split()) for text in texts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


async def _json(send: Send, status: int, content: object) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def _event(send: Send, content: object) -> None:
    body = b"data: " + json.dumps(content).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
