"""Which attention backend a device gets."""

import torch

from pdserve.attention.base import AttentionBackend
from pdserve.attention.torch_backend import TorchAttention

LARGEST_TRITON_HEAD = 256


def make_attention(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool,
) -> AttentionBackend:
    """For one rank's heads: Triton's kernel on a GPU, torch's attention elsewhere and for heads too large for it."""
    if device.type == "cuda" and head_dim <= LARGEST_TRITON_HEAD:
        from pdserve.attention.triton_backend import TritonAttention

        return TritonAttention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            device=device,
            deterministic=deterministic,
        )
    return TorchAttention(block_size=block_size, dtype=dtype, device=device, deterministic=deterministic)
