"""The models that are measured: shapes with random weights, written as a checkpoint that every contender reads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import Shape

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="25M", kind="qwen3", hidden=512, mlp=1536, layers=8, heads=8, kv_heads=4, head_dim=64,
            vocab=4096, positions=4096, tied=True,
        ),
        Shape(
            name="0.5B", kind="qwen2", hidden=896, mlp=4864, layers=24, heads=14, kv_heads=2, head_dim=64,
            vocab=151936, positions=4096, tied=True,
        ),
    )
}  # fmt: skip
"""0.5B is Qwen2.5-0.5B."""


def write_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Path:
    """A checkpoint of dtype with weights drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config | {"dtype": str(dtype).removeprefix("torch.")}))
    weights = {name: _drawn(name, size, generator).to(dtype) for name, size in _tensors(shape).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by its name in the checkpoint."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (query, shape.hidden),
        "self_attn.k_proj.weight": (key, shape.hidden),
        "self_attn.v_proj.weight": (key, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, query),
        "mlp.gate_proj.weight": (shape.mlp, shape.hidden),
        "mlp.up_proj.weight": (shape.mlp, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.mlp),
    }
    if shape.kind == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (shape.head_dim,) for name in "qk"}
    else:
        layer |= {f"self_attn.{n}_proj.bias": (w,) for n, w in (("q", query), ("k", key), ("v", key))}
    outer = {"model.embed_tokens.weight": (shape.vocab, shape.hidden), "model.norm.weight": (shape.hidden,)}
    return outer | {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}


def _drawn(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, generator=generator)
    return noise * 0.1 + 1 if name.endswith("norm.weight") else noise * 0.03
