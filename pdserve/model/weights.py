"""Filling a decoder's parameters from safetensors, fused projections slice by slice."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.model.decoder import Decoder
from pdserve.model.layers import Attention, DecoderLayer, RMSNorm
from pdserve.model.linear import Linear

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_NAMES = 5


def load_weights(model: Decoder, files: Iterable[Path]) -> None:
    """Copy every tensor into place, converting its dtype.

    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape or type.
    """
    targets = checkpoint_targets(model)
    missing = dict.fromkeys(targets)
    unexpected: list[str] = []
    for name, tensor in _tensors(files):
        if name in targets:
            _fill(targets[name], name, tensor)
            missing.pop(name, None)
        elif not _redundant(name, model):
            unexpected.append(name)
    if missing or unexpected:
        parts = [f"{word} {_names(names)}" for word, names in (("missing", list(missing)), ("unexpected", unexpected))]
        raise CheckpointError(f"the weights do not fit config.json ({model.config.family}): {'; '.join(parts)}")


def checkpoint_targets(model: Decoder) -> dict[str, Tensor]:
    """Where each tensor of a Hugging Face checkpoint goes: a whole parameter or a slice of one."""
    targets = {"model.embed_tokens.weight": model.embedding.data, "model.norm.weight": model.norm.weight.data}
    if not model.config.tied_head:
        targets["lm_head.weight"] = model.head.weight.data
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        targets |= {f"model.layers.{index}.{name}": tensor for name, tensor in _layer_targets(layer)}
    return targets


def _layer_targets(layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
    attention, mlp = layer.attention, layer.mlp
    yield "input_layernorm.weight", layer.attention_norm.weight.data
    yield "post_attention_layernorm.weight", layer.mlp_norm.weight.data
    yield from _norm_targets(attention)
    dim = attention.head_dim
    sizes = {"q_proj": attention.heads * dim, "k_proj": attention.kv_heads * dim, "v_proj": attention.kv_heads * dim}
    yield from _linear_targets("self_attn", attention.qkv, sizes)
    yield from _linear_targets("self_attn", attention.output, {"o_proj": attention.output.weight.shape[0]})
    half = mlp.gate_up.weight.shape[0] // 2
    yield from _linear_targets("mlp", mlp.gate_up, {"gate_proj": half, "up_proj": half})
    yield from _linear_targets("mlp", mlp.down, {"down_proj": mlp.down.weight.shape[0]})


def _norm_targets(attention: Attention) -> Iterator[tuple[str, Tensor]]:
    for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
        if isinstance(norm, RMSNorm):
            yield f"self_attn.{name}.weight", norm.weight.data


def _linear_targets(prefix: str, linear: Linear, sizes: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Split a fused linear's output features among the projections it was fused from."""
    rows = list(sizes.values())
    for name, weight in zip(sizes, torch.split(linear.weight.data, rows), strict=True):
        yield f"{prefix}.{name}.weight", weight
    if linear.bias is not None:
        for name, bias in zip(sizes, torch.split(linear.bias.data, rows), strict=True):
            yield f"{prefix}.{name}.bias", bias


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                names = content.keys()
                yield from ((name, content.get_tensor(name)) for name in names)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def _fill(target: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"tensor {name} is {tensor.dtype}; supported are float32, float16 and bfloat16")
    if tensor.shape != target.shape:
        raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, config.json asks {list(target.shape)}")
    target.copy_(tensor)


def _redundant(name: str, model: Decoder) -> bool:
    """A tied head stored a second time, or rotary frequencies, which follow from the configuration."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tied_head)


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES]) or "none"
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
