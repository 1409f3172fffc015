"""Sizes of the models that are measured; their weights are drawn, for speed does not depend on what they are."""

from dataclasses import dataclass
from typing import Any

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder, as config.json tells it. kind is its model_type: llama, qwen2 (queries, keys, values have biases) or
    qwen3 (queries and keys have norms)."""

    name: str
    kind: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tied: bool = False
    eps: float = 1e-6
    rope_theta: float = 1e6

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": [_ARCHITECTURES[self.kind]],
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "eos_token_id": self.vocab - 1,
            "hidden_act": "silu",
            "attention_bias": False,
        }

    @property
    def layer_weights(self) -> int:
        """Elements of all layers' projections."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def kv_elements(self) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def step_bytes(self, rows: int, context: int, itemsize: int) -> int:
        """What a decode step must read."""
        return itemsize * (self.layer_weights + self.hidden * self.vocab + rows * context * self.kv_elements)

    def prefill_operations(self, tokens: int) -> int:
        """Of one sequence from its beginning, its last token's logits left out."""
        pairs = tokens * (tokens + 1) // 2
        return 2 * self.layer_weights * tokens + 4 * self.layers * self.heads * self.head_dim * pairs
