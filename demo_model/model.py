"""The model that is trained and shipped: transformers' own Qwen3 in the demo shape."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo_model.recipe import END_OF_TEXT_ID, SHAPE, TURN_END_ID, VOCABULARY_SIZE

_EMBEDDING_STD = 0.02


def config() -> Qwen3Config:
    """Return the configuration that also ships as config.json."""
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.feed_forward,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.query_heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.positions,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        initializer_range=_EMBEDDING_STD,
        eos_token_id=TURN_END_ID,
        bos_token_id=None,
        pad_token_id=END_OF_TEXT_ID,
        use_cache=True,
    )


def build(seed: int) -> Qwen3ForCausalLM:
    """Build a freshly initialised model.

    Projections that write into the residual stream start smaller, so that its variance does not grow with depth.
    """
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            std = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * SHAPE.layers) ** 0.5
            torch.nn.init.normal_(parameter, std=std)
    return model
