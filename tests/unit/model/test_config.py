"""Reading config.json: what is understood, and what is refused in which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.errors import CheckpointError
from pdserve.model.config import Llama3Scaling, load_config, parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_head_dim_is_derived_unless_given() -> None:
    assert parse_config(LLAMA).head_dim == 16
    assert parse_config(LLAMA | {"head_dim": None}).head_dim == 16
    assert parse_config(LLAMA | {"head_dim": 32}).head_dim == 32


def test_key_heads_default_to_heads() -> None:
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert parse_config(without).num_kv_heads == 4


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "qk_norm"),
    [
        ("LlamaForCausalLM", False, False),
        ("MistralForCausalLM", False, False),
        ("Qwen2ForCausalLM", True, False),
        ("Qwen3ForCausalLM", False, True),
    ],
)
def test_each_family_has_its_own_parameters(architecture: str, qkv_bias: bool, qk_norm: bool) -> None:
    config = parse_config(LLAMA | {"architectures": [architecture]})
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (qkv_bias, False, qk_norm)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
    ],
    ids=["rope_scaling", "rope_scaling with type", "rope_parameters"],
)
def test_llama3_rope_is_read_in_every_spelling(rope: dict[str, Any]) -> None:
    config = parse_config(LLAMA | rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
    ],
)
def test_plain_rope(rope: dict[str, Any], theta: float) -> None:
    config = parse_config(LLAMA | rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, None)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_eos_is_read_as_one_id_or_several(value: object, ids: tuple[int, ...]) -> None:
    assert parse_config(LLAMA | {"eos_token_id": value}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"),
        ({"architectures": []}, "architecture None is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints are not supported"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
            r"sliding_window = 4096\) is not supported",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 32},
            r"sliding_window = 32\) is not supported",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention is"),
        ({"hidden_act": "gelu"}, "activation gelu is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "rope type yarn is not supported; supported are default",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3 rope parameters are incomplete"),
        ({"rope_scaling": {"rope_type": "llama3", **SCALING, "low_freq_factor": 4}}, "need factor > 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, not None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, not '64'"),
        ({"num_attention_heads": 3}, "must be a multiple of"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(LLAMA | change)


def test_an_unused_sliding_window_is_no_obstacle() -> None:
    change = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 32}
    assert parse_config(LLAMA | change).family == "qwen2"


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "as JSON"), ("[]", "a JSON object")])
def test_an_unreadable_config_names_the_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        load_config(tmp_path)


def test_a_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": "bfloat16"}))
    assert load_config(tmp_path).dtype == "bfloat16"
