"""Models of the published shapes with random weights: speed does not depend on what they are."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.timing import DEVICE, HAS_GPU
from pdserve.core.protocols import ModelInfo
from pdserve.model.config import parse_config
from pdserve.model.decoder import Decoder
from pdserve.model.kernel_ops import KernelLinear, KernelOps
from pdserve.model.layers import Build
from pdserve.model.loader import LoadedModel
from pdserve.model.parallel import SingleRank
from pdserve.model.sharding import shard_model
from pdserve_kernels.small_gemm.kernel import Workspace

DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
"""Triton's interpreter computes wrongly in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What config.json says; kind is its model_type."""

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
    rope_theta: float = 1e6

    @property
    def raw(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.kind]],
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "eos_token_id": self.vocab - 1,
            "hidden_act": "silu",
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


QWEN3_06B = Shape(
    name="Qwen3-0.6B", kind="qwen3", hidden=1024, mlp=3072, layers=28, heads=16, kv_heads=8, head_dim=128,
    vocab=151936, positions=40960, tied=True,
)  # fmt: skip
QWEN3_8B = Shape(
    name="Qwen3-8B", kind="qwen3", hidden=4096, mlp=12288, layers=36, heads=32, kv_heads=8, head_dim=128,
    vocab=151936, positions=40960,
)  # fmt: skip
LLAMA_8B = Shape(
    name="Llama-3.1-8B", kind="llama", hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
    vocab=128256, positions=131072, rope_theta=5e5,
)  # fmt: skip
TINY = Shape(
    name="tiny", kind="qwen3", hidden=64, mlp=96, layers=1, heads=4, kv_heads=2, head_dim=16,
    vocab=256, positions=512, tied=True,
)  # fmt: skip


def random_model(shape: Shape, *, deterministic: bool = False) -> LoadedModel:
    """On the device, in kernels."""
    config = parse_config(shape.raw)
    method = KernelLinear(Workspace.on(DEVICE), deterministic=deterministic)
    build = Build(
        config=config,
        method=method,
        ops=KernelOps(method),
        parallel=SingleRank(),
        shard=shard_model(config, 0, 1),
        dtype=DTYPE,
        device=DEVICE,
    )
    model = Decoder(build)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02, generator=generator)
    info = ModelInfo(
        name=shape.name,
        revision="random",
        vocab_size=shape.vocab,
        max_model_len=shape.positions,
        eos_token_ids=(shape.vocab - 1,),
    )
    return LoadedModel(
        model=model.eval(),
        config=config,
        shard=build.shard,
        parallel=build.parallel,
        info=info,
        dtype=DTYPE,
        device=DEVICE,
        kernels=True,
    )


def transformers_model(shape: Shape) -> Any:
    """The same shape in transformers, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {name: value for name, value in shape.raw.items() if name != "model_type"}
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.kind, **raw), dtype=DTYPE)
    return model.eval()
