"""Which attention backend a device gets."""

import torch

from pdserve.attention.arrays import have_cpu_kernels
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
    """For one rank's heads: Triton's kernel on a GPU, Numba's on a CPU; torch's attention for heads too large for the
    former and without the latter."""
    if device.type == "cpu" and have_cpu_kernels():
        from pdserve.attention.cpu_backend import CpuAttention

        return CpuAttention()
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
