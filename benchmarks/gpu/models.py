"""Models of the published shapes with random weights: speed does not depend on what they are."""

from typing import Any

import torch

from benchmarks.gpu.timing import DEVICE, HAS_GPU
from benchmarks.shapes import Shape
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
    config = parse_config(shape.config)
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

    raw = {name: value for name, value in shape.config.items() if name != "model_type"}
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.kind, **raw), dtype=DTYPE)
    return model.eval()
