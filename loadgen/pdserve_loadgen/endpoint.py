"""One OpenAI-compatible endpoint: how a request is worded and what its stream means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson


class Api(StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """url without path. extra: fields put into every body, such as temperature. timeout: seconds per request."""

    url: str
    model: str
    api: Api = Api.CHAT
    api_key: str | None = field(default=None, repr=False)
    extra: Mapping[str, object] = field(default_factory=dict)
    timeout: float = 600.0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.api is Api.CHAT else "/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, exchange: "Exchange", max_tokens: int) -> bytes:
        content: dict[str, object] = (
            {"messages": exchange.messages()} if self.api is Api.CHAT else {"prompt": exchange.text()}
        )
        options = {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        return orjson.dumps({"model": self.model, **content, **options, **self.extra})


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was said so far: texts of user and model in turn, the user's last."""

    texts: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.texts)]

    def text(self) -> str:
        """For an endpoint without turns: everything in one."""
        return " ".join(self.texts)

    def with_answer(self, answer: str, following: str) -> "Exchange":
        return Exchange((*self.texts, answer, following))


@dataclass(slots=True)
class StreamReading:
    """What the events of one stream said so far. The first event with text is the first token."""

    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finished: bool = False
    error: str | None = None

    def take(self, data: bytes) -> bool:
        """Whether this event carried text. Raises ValueError for data no such stream has."""
        if data == b"[DONE]":
            self.finished = True
            return False
        try:
            return self._take(orjson.loads(data))
        except (AttributeError, KeyError, TypeError, IndexError):
            raise ValueError("an event is not what an OpenAI stream carries") from None

    def _take(self, event: dict[str, Any]) -> bool:
        if event.get("error"):
            self.error = error_code(event) or "unknown"
            return False
        if usage := event.get("usage"):
            self.prompt_tokens, self.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        carried = False
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            pieces = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"))
            spoken = [piece for piece in pieces if piece]
            self.text += spoken
            carried = carried or bool(spoken)
            self.finished = self.finished or choice.get("finish_reason") is not None
        return carried


def error_code(body: object) -> str | None:
    """The code (or type) in an error envelope; None when the body is not one."""
    error = body.get("error") if isinstance(body, dict) else None
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return str(code)[:64] if code else None
