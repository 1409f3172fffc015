"""The bodies clients send, checked field by field.

Unknown fields are ignored. Known ones that would change the answer but are not supported are refused, unless
they have the value that changes nothing. Types are strict: "1" and true are not numbers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pdserve.core.errors import InvalidRequest, Unsupported
from pdserve.core.request import SamplingParams

_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
"""Parameter → values that change nothing and are therefore accepted; null always is."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """What both generating endpoints take. null means the default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", hide_input_in_errors=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_listed, json_schema_input_type=str | list[str] | None)] = None
    top_k: int | None = Field(None, description="0 or -1: off")
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = Field(None, description="the lower goes first; also as header x-request-priority")
    timeout: float | None = Field(
        None, gt=0, description="seconds until the answer must be complete; also as header x-request-timeout"
    )

    _same_in_sampling: ClassVar = (
        "temperature",
        "top_p",
        "seed",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in _NOT_SUPPORTED.keys() & data.keys():
                _check_neutral(name, data[name])
        return data

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk. Raises InvalidRequest for options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options only goes with stream: true", "stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, *, max_tokens: int, logprobs: bool, defaults: Mapping[str, float]) -> SamplingParams:
        """Raises InvalidRequest naming the parameter that is out of range."""
        given = {name: getattr(self, name) for name in self._same_in_sampling if getattr(self, name) is not None}
        if self.top_k is not None:
            given["top_k"] = 0 if self.top_k == -1 else self.top_k
        return SamplingParams(
            **{**defaults, **given},
            max_tokens=max_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions. The prompt is text, a list of token ids, or a list of one of these."""

    prompt: Any
    logprobs: int | None = Field(None, ge=0, description="0: log probabilities of the chosen tokens")

    def one_prompt(self) -> str | list[int]:
        """Raises InvalidRequest for other shapes, Unsupported for several prompts."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise Unsupported("several prompts in one request are not supported; send one each", "prompt")
            prompt = prompt[0]
        if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(item) is int for item in prompt)):
            return prompt
        raise InvalidRequest("prompt must be a string or a list of token ids", "prompt")


class Message(BaseModel):
    """One turn. content is a string or a list of `{"type": "text", "text": …}`."""

    model_config = ConfigDict(strict=True)

    role: str
    content: Any = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None

    def conversation(self) -> list[dict[str, str]]:
        """{role, content} of every message. Raises InvalidRequest, Unsupported for anything but text.

        A developer message is a system message; the texts of a list are joined by line breaks."""
        return [_plain(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _plain(message: Message, path: str) -> dict[str, str]:
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise Unsupported("tools are not supported", path)
    if message.role not in _ROLES:
        raise InvalidRequest(f"{path}.role must be system, developer, user or assistant", f"{path}.role")
    return {"role": _ROLES[message.role], "content": _text(message.content, f"{path}.content")}


def _text(content: object, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{path} must be a string or a list of text parts", path)
    return "\n".join(_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind != "text":
        raise Unsupported(f"{path}: only text parts are supported", path)
    raise InvalidRequest(f'{path} must be {{"type": "text", "text": "…"}}', path)


def _check_neutral(name: str, value: object) -> None:
    accepted = _NOT_SUPPORTED[name]
    if value is None or any(value == neutral and type(value) is type(neutral) for neutral in accepted):
        return
    hint = f"; leave it out or send {accepted[0]!r}" if accepted else ""
    raise Unsupported(f"{name} is not supported{hint}", name)
