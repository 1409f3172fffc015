"""Text and conversations to token ids, from a model directory's tokenizer.json and chat template."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import CheckpointError, InvalidRequest, Unsupported
from pdserve.gateway.chat_template import ChatTemplate
from pdserve.gateway.vocabulary import Vocabulary

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Never part of a text meant for interchange, so one of them can mark a cut in it."""


class Tokenizer:
    """Thread-safe; encoding releases the GIL, so call it from a worker thread."""

    def __init__(self, fast: FastTokenizer, vocabulary: Vocabulary, template: ChatTemplate | None) -> None:
        self._fast = fast
        self._template = template
        self.vocabulary = vocabulary
        self._control = _any_of([vocabulary.spelling(token_id).decode() for token_id in vocabulary.special])

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Raises CheckpointError when tokenizer.json is missing, unreadable or of an unknown kind."""
        path = directory / "tokenizer.json"
        try:
            source = path.read_bytes()
            decoder = orjson.loads(source).get("decoder")
            fast = FastTokenizer.from_buffer(source)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: only fast tokenizers are supported") from error
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        return cls(fast, Vocabulary(fast, decoder), _load_template(directory))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Tokens of a raw prompt, BOS included where the model wants one. Special tokens spelled out in the text
        are control tokens, so that a prompt can be written by hand."""
        return self._fast.encode(text).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation ({role, content} each), ending where the assistant begins to speak.

        Equal to transformers' apply_chat_template, except that a special token spelled out in a content
        stays text: no one can end their message and speak in another role. Raises Unsupported without a
        chat template, InvalidRequest when it refuses the messages."""
        if self._template is None:
            raise Unsupported("this model has no chat template; use /v1/completions", "messages")
        if not any(self._control.search(message["content"]) for message in messages):
            return self._fast.encode(self._template.render(messages), add_special_tokens=False).ids
        cut = _unused_mark(messages)
        defused = [{**message, "content": self._defuse(message["content"], cut)} for message in messages]
        # Encoded apart, the halves of a spelled-out special token are ordinary text.
        pieces = self._template.render(defused).split(cut)
        return [i for piece in pieces for i in self._fast.encode(piece, add_special_tokens=False).ids]

    def _defuse(self, text: str, cut: str) -> str:
        """Put a cut into every special token; repeated, for what is left may be another one."""
        while self._control.search(text):
            text = self._control.sub(lambda match: match[0][0] + cut + match[0][1:], text)
        return text


def _any_of(spellings: list[str]) -> re.Pattern[str]:
    ordered = sorted((text for text in spellings if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _unused_mark(messages: Sequence[Mapping[str, str]]) -> str:
    for mark in _NONCHARACTERS:
        if not any(mark in message["content"] for message in messages):
            return mark
    raise InvalidRequest("the messages use all Unicode noncharacters from U+FDD0 to U+FDEF", "messages")


def _load_template(directory: Path) -> ChatTemplate | None:
    config = _read_json(directory / "tokenizer_config.json")
    special_tokens = {}
    for name in _SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            special_tokens[name] = content
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return ChatTemplate(source, special_tokens) if isinstance(source, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
