"""Filling a decoder's parameters from safetensors: fused projections slice by slice, and of each tensor only the
part this rank holds."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.model.config import ModelConfig
from pdserve.model.decoder import Decoder
from pdserve.model.layers import Attention, DecoderLayer
from pdserve.model.linear import Linear
from pdserve.model.norm import RMSNorm
from pdserve.model.sharding import Range

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_NAMES = 5


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Where a checkpoint's tensor goes: a whole parameter or a slice of one, and what part of the tensor it is.

    part is (dimension, first, end) of total elements in that dimension; None is the whole tensor.
    """

    tensor: Tensor
    part: tuple[int, int, int] | None = None
    total: int = 0

    @property
    def stored_shape(self) -> list[int]:
        """The shape the tensor has in the checkpoint."""
        shape = list(self.tensor.shape)
        if self.part is not None:
            shape[self.part[0]] = self.total
        return shape


@dataclass(frozen=True, slots=True)
class _Split:
    """A projection's output (or input) features: those of this rank, of total in the checkpoint."""

    features: Range
    total: int

    def of(self, tensor: Tensor, dimension: int) -> Target:
        whole = self.features == (0, self.total)
        return Target(tensor) if whole else Target(tensor, (dimension, *self.features), self.total)


def load_weights(model: Decoder, files: Iterable[Path]) -> None:
    """Copy every tensor, or this rank's part of it, into place, converting its dtype.

    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape or type.
    """
    targets = checkpoint_targets(model)
    missing = dict.fromkeys(targets)
    unexpected: list[str] = []
    for name, stored in _stored(files):
        if name in targets:
            _fill(targets[name], name, stored)
            missing.pop(name, None)
        elif not _redundant(name, model):
            unexpected.append(name)
    if missing or unexpected:
        parts = [f"{word} {_names(names)}" for word, names in (("missing", list(missing)), ("unexpected", unexpected))]
        raise CheckpointError(f"the weights do not fit config.json ({model.config.family}): {'; '.join(parts)}")


def checkpoint_targets(model: Decoder) -> dict[str, Target]:
    """Where each tensor of a Hugging Face checkpoint goes on this rank."""
    targets = {
        "model.embed_tokens.weight": Target(model.embedding.data),
        "model.norm.weight": Target(model.norm.weight.data),
    }
    if model.head is not None and not model.config.tied_head:
        targets["lm_head.weight"] = Target(model.head.weight.data)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        targets |= {f"model.layers.{index}.{name}": target for name, target in _layer_targets(layer, model)}
    return targets


def _layer_targets(layer: DecoderLayer, model: Decoder) -> Iterator[tuple[str, Target]]:
    attention, mlp, config, shard = layer.attention, layer.mlp, model.config, model.shard
    yield "input_layernorm.weight", Target(layer.attention_norm.weight.data)
    yield "post_attention_layernorm.weight", Target(layer.mlp_norm.weight.data)
    yield from _norm_targets(attention)
    heads = _head_split(shard.heads, config.num_heads, config)
    kv_heads = _head_split(shard.kv_heads, config.num_kv_heads, config)
    columns = _Split(shard.intermediate, config.intermediate_size)
    yield from _fused_targets("self_attn", attention.qkv, {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads})
    yield from _partial_targets("self_attn.o_proj", attention.output, heads)
    yield from _fused_targets("mlp", mlp.gate_up, {"gate_proj": columns, "up_proj": columns})
    yield from _partial_targets("mlp.down_proj", mlp.down, columns)


def _head_split(heads: Range, total: int, config: ModelConfig) -> _Split:
    return _Split((heads[0] * config.head_dim, heads[1] * config.head_dim), total * config.head_dim)


def _norm_targets(attention: Attention) -> Iterator[tuple[str, Target]]:
    for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
        if isinstance(norm, RMSNorm):
            yield f"self_attn.{name}.weight", Target(norm.weight.data)


def _fused_targets(prefix: str, linear: Linear, outputs: dict[str, _Split]) -> Iterator[tuple[str, Target]]:
    """Column-parallel: divide a fused linear's output features among the projections it was fused from."""
    rows = [split.features[1] - split.features[0] for split in outputs.values()]
    for (name, split), weight in zip(outputs.items(), torch.split(linear.weight.data, rows), strict=True):
        yield f"{prefix}.{name}.weight", split.of(weight, 0)
    if linear.bias is not None:
        for (name, split), bias in zip(outputs.items(), torch.split(linear.bias.data, rows), strict=True):
            yield f"{prefix}.{name}.bias", split.of(bias, 0)


def _partial_targets(name: str, linear: Linear, inputs: _Split) -> Iterator[tuple[str, Target]]:
    """Row-parallel: a part of the input features."""
    yield f"{name}.weight", inputs.of(linear.weight.data, 1)
    if linear.bias is not None:
        yield f"{name}.bias", Target(linear.bias.data)


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Every tensor's name and safetensors' handle to it, which reads what is asked for."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                names = content.keys()
                yield from ((name, content.get_slice(name)) for name in names)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def _fill(target: Target, name: str, stored: Any) -> None:
    dtype, shape = stored.get_dtype(), stored.get_shape()
    if dtype not in _DTYPES:
        raise CheckpointError(f"tensor {name} is {dtype}; supported are {', '.join(_DTYPES)}")
    if shape != target.stored_shape:
        raise CheckpointError(f"tensor {name} has shape {shape}, config.json asks {target.stored_shape}")
    if target.part is None:
        target.tensor.copy_(stored[:])
        return
    dimension, first, end = target.part
    target.tensor.copy_(stored[first:end] if dimension == 0 else stored[:, first:end])


def _redundant(name: str, model: Decoder) -> bool:
    """A head that is tied or another rank's, a bias that rank 0 adds, or rotary frequencies, which follow from the
    configuration."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return model.config.tied_head or model.head is None
    biased = {"o_proj.bias": model.config.output_bias, "down_proj.bias": model.config.mlp_bias}
    return model.shard.rank > 0 and any(used and name.endswith(suffix) for suffix, used in biased.items())


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES]) or "none"
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
