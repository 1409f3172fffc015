"""Tokenizers of both supported kinds, small enough to build for each test, in a model directory's files."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdserve.core.protocols import ModelInfo

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>")
BYTE_LEVEL_SIZE = 256 + 3 + len(SPECIAL)
BOS, IM_START, IM_END = range(BYTE_LEVEL_SIZE - 3, BYTE_LEVEL_SIZE)
MODEL = ModelInfo(name="tiny", revision="1", vocab_size=BYTE_LEVEL_SIZE + 8, max_model_len=512, eos_token_ids=(IM_END,))
"""vocab_size is larger than the tokenizer's: embedding tables are padded."""


def byte_level(path: Path, *, template: str | None = CHATML, bos: bool = False) -> Path:
    """Every byte a token, three merges, three special tokens."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], BOS)]
        )
    return _save(tokenizer, path, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "chat_template": template})


def byte_fallback(path: Path) -> Path:
    """Sentencepiece style: ▁ for spaces, `<0xNN>` for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "é", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in pieces[:3]])
    return _save(tokenizer, path, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def _save(tokenizer: Tokenizer, path: Path, config: dict[str, object]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return path
