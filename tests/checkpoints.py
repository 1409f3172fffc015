"""Tiny random checkpoints in Hugging Face layout, one per supported family, for every test that needs a model.

Weights are drawn with a large deviation: with the customary 0.02 and tied heads the argmax ignores the
context, and a parity test over such a model cannot fail.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""rope_parameters that bend all three bands of a head of 16 within a few hundred positions."""

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
_STD = 0.15
_PAIRS = "thheineranreonatenndtiesorteofedisitalarsttontngsehaasouiolevecomedehiriroicneea"
_MERGES = tuple(_PAIRS[i : i + 2] for i in range(0, len(_PAIRS), 2))
_SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
VOCAB_SIZE = 256 + len(_MERGES) + len(_SPECIAL)
BOS_TOKEN_ID = VOCAB_SIZE - 4
EOS_TOKEN_IDS = (VOCAB_SIZE - 2, VOCAB_SIZE - 1)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    tie: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a random model of a family with tokenizer and chat template to path, and return path.

    overrides go to the family's transformers config (e.g. rope_parameters=LLAMA3_ROPE). Every token id is
    decodable; `<|im_end|>` and `<|endoftext|>` end a sequence. sharded writes several safetensors files.
    """
    config_class, model_class = _CLASSES[family]
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tie,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_IDS[0],
        "pad_token_id": None,
    }
    if family == "mistral":
        shape["sliding_window"] = None
    model = model_class(config_class(**(shape | overrides)))
    _randomise(model, seed)
    model.to(dtype)
    model.generation_config.eos_token_id = list(EOS_TOKEN_IDS)
    model.save_pretrained(path, max_shard_size="100KB" if sharded else "1GB")
    write_tokenizer(path)
    return path


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.empty_like(parameter).normal_(std=_STD, generator=generator)
            parameter.copy_(noise + 1.0 if name.endswith("norm.weight") else noise)


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE tokens with a ChatML template, in the files transformers expects."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_MERGES]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [(pair[0], pair[1]) for pair in _MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
