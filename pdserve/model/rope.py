"""Rotary position embedding in the half-split ("neox") form of Hugging Face checkpoints."""

from math import pi

import torch
from torch import Tensor, nn

from pdserve.model.config import Llama3Scaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """(head_dim / 2,) float32 angles per position."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_positions * frequencies / (2 * pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class Rotary(nn.Module):
    """Turns query and key heads by their position.

    Cosines and sines of all positions are tabulated: looking one up gives the same bits in every batch.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        positions = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, inverse_frequencies(config))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens,) positions → cos, sin, each (tokens, 1, head_dim / 2) float32."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (tokens, heads, head_dim) turned by Rotary.at's result; computed in float32, returned in x's dtype."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
