"""The keyed sum's kernel on a GPU equals the reference on the same bytes."""

import numpy as np
import pytest
import torch

from pdserve_kernels.kv_digest import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_scattered_blocks_of_a_gpu_have_the_digest_of_the_same_bytes_on_the_host() -> None:
    from pdserve_kernels.kv_digest import kernel

    memory = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    offsets = np.random.default_rng(1).permutation(32)[:9].astype(np.uint64) << np.uint64(21)
    lengths = np.full(9, (2 << 20) - 24, dtype=np.uint64)
    expected = reference.keyed_sum((memory[o : o + n] for o, n in zip(offsets, lengths, strict=True)), 2**64 - 3)
    assert kernel.keyed_sum(torch.from_numpy(memory).cuda(), offsets, lengths, 2**64 - 3) == expected
