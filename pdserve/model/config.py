"""What a checkpoint's config.json says, reduced to the facts the model code needs.

Four families share one decoder: Llama, Qwen2, Qwen3 and Mistral. Whatever this version cannot compute exactly
is refused here, with the list of what it can.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.core.errors import CheckpointError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama-3.1's stretching of rotary frequencies (https://arxiv.org/abs/2407.21783, §3.4.2).

    Wavelengths longer than original_max_positions / low_freq_factor are stretched by factor, those shorter than
    original_max_positions / high_freq_factor kept, and those between interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and options of one decoder. dtype is the checkpoint's own ("" when config.json has none)."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    dtype: str
    eos_token_ids: tuple[int, ...]


def load_config(path: Path) -> ModelConfig:
    """Read config.json of a checkpoint directory. Raises CheckpointError."""
    return parse_config(read_json(path / "config.json"))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; a checkpoint directory has config.json and safetensors") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn the content of config.json into a ModelConfig. Raises CheckpointError."""
    family = _family(raw)
    _refuse_unsupported(raw, family)
    theta, scaling = _rope(raw)
    heads = _positive(raw, "num_attention_heads")
    hidden = _positive(raw, "hidden_size")
    attention_bias = bool(raw.get("attention_bias", False))
    config = ModelConfig(
        family=family,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_positive(raw, "num_key_value_heads", default=heads),
        head_dim=_positive(raw, "head_dim", default=hidden // heads),
        max_positions=_positive(raw, "max_position_embeddings"),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        rope_theta=theta,
        rope_scaling=scaling,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or ""),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
    )
    _check_shape(config)
    return config


def token_ids(value: object) -> tuple[int, ...]:
    """eos_token_id as it occurs in the wild (absent, one id, a list) as a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise CheckpointError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(values)


def _family(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise CheckpointError(f"architecture {name} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    if raw.get("quantization_config"):
        raise CheckpointError("quantized checkpoints are not supported; use float32, float16 or bfloat16 weights")
    window_used = raw.get("use_sliding_window", False) if family.startswith("qwen") else family == "mistral"
    if window_used and raw.get("sliding_window") is not None:
        raise CheckpointError(
            f"sliding window attention (sliding_window = {raw['sliding_window']}) is not supported; "
            "only full attention is (sliding_window null)"
        )
    kinds = set(raw.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise CheckpointError(f"layer_types {sorted(kinds)} are not supported; only full_attention is")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"activation {raw['hidden_act']} is not supported; only silu is")


def _rope(raw: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"rope parameters must be a JSON object, not {rope!r}")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"rope type {kind} is not supported; supported are default, llama3")
    return theta, _llama3_scaling(rope)


def _llama3_scaling(rope: Mapping[str, Any]) -> Llama3Scaling:
    try:
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"llama3 rope parameters are incomplete: {error!r}") from error
    if scaling.factor <= 0 or not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise CheckpointError(f"llama3 rope parameters need factor > 0 and 0 < low < high frequency factor: {scaling}")
    return scaling


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _check_shape(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads ({config.num_heads}) must be a multiple of "
            f"num_key_value_heads ({config.num_kv_heads})"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"head_dim must be even, not {config.head_dim}")
