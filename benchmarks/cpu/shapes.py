"""The models that are measured: shapes with random weights, written as a checkpoint that every contender reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3 (with norms of queries and keys) or Qwen2 (with biases instead) decoder; the head is tied."""

    qwen3: bool
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_dim: int = 64
    positions: int = 4096
    eps: float = 1e-6
    rope_theta: float = 1e6

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        family = "qwen3" if self.qwen3 else "qwen2"
        return {
            "architectures": [f"Q{family[1:]}ForCausalLM"],
            "model_type": family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "eos_token_id": 2,
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its name in the checkpoint."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (query, self.hidden),
            "self_attn.k_proj.weight": (key, self.hidden),
            "self_attn.v_proj.weight": (key, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, query),
            "mlp.gate_proj.weight": (self.mlp, self.hidden),
            "mlp.up_proj.weight": (self.mlp, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.mlp),
        }
        if self.qwen3:
            layer |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        else:
            layer |= {f"self_attn.{n}_proj.bias": (w,) for n, w in (("q", query), ("k", key), ("v", key))}
        outer = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        return outer | {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in layer.items()}


SHAPES = {
    "25M": Shape(qwen3=True, hidden=512, layers=8, heads=8, kv_heads=4, mlp=1536, vocab=4096),
    "0.5B": Shape(qwen3=False, hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocab=151936),
}
"""0.5B is Qwen2.5-0.5B."""


def write_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Path:
    """A checkpoint of dtype with weights drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config | {"dtype": str(dtype).removeprefix("torch.")}))
    weights = {name: _drawn(name, size, generator).to(dtype) for name, size in shape.tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _drawn(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, generator=generator)
    return noise * 0.1 + 1 if name.endswith("norm.weight") else noise * 0.03
