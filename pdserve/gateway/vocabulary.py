"""Bytes of every token: what incremental detokenization needs and full decoding hides.

Two families of tokenizers are known, by the decoder their tokenizer.json names: byte-level BPE (Llama 3,
Qwen, GPT-2) and sentencepiece style with byte fallback (Llama 2, Mistral). In both, the bytes of a text are
the bytes of its tokens, one after the other.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import CheckpointError

_SENTENCEPIECE = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_SPACE_MARK = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Token id → bytes, computed when first asked for.

    Raises CheckpointError when the tokenizer's decoder is of another family. Ids the tokenizer does not know
    (padding of the embedding table) have no bytes.
    """

    def __init__(self, tokenizer: FastTokenizer, decoder: Mapping[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._piece_bytes = _piece_bytes(decoder)
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {}

    def spelling(self, token_id: int) -> bytes:
        """Bytes of a token, special ones spelled out."""
        cached = self._cache.get(token_id)
        if cached is None:
            piece = self._tokenizer.id_to_token(token_id)
            cached = self._piece_bytes(piece) if piece is not None else b""
            self._cache[token_id] = cached
        return cached

    def text_bytes(self, token_id: int) -> bytes:
        """Bytes a token adds to a text; none for a special token."""
        return b"" if token_id in self.special else self.spelling(token_id)


def _piece_bytes(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    steps = _flatten(decoder) if decoder else []
    kinds = {str(step["type"]) for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds <= _SENTENCEPIECE and ("Metaspace" in kinds or "Replace" in kinds):
        return _byte_fallback if "ByteFallback" in kinds else _metaspace
    raise CheckpointError(
        f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor sentencepiece style"
    )


def _flatten(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in piece)
    except KeyError:  # an added token that is plain text rather than mapped bytes
        return piece.encode()


def _byte_fallback(piece: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else _metaspace(piece)


def _metaspace(piece: str) -> bytes:
    return piece.replace(_SPACE_MARK, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printable Latin-1 byte stands for itself, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
