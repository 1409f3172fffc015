"""The kernels around attention on a GPU: in bf16 and fp32 against float64, and the CPU sampler's own tokens."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(dtype).cuda()


def wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().cpu().numpy()


def assert_close(got: Tensor, expected: NDArray[np.float64]) -> None:
    atol = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[got.dtype] * np.abs(expected).max()
    np.testing.assert_allclose(wide(got), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (257, 1023), (3, 4096), (2, 16384)])
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    from pdserve_kernels.fused_norm import kernel, reference

    x, delta, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((rows, width), (rows, width), (width,))))
    total, expected = reference.add_norm(wide(x), wide(delta), wide(weight), 1e-5)
    assert_close(kernel.add_norm(x, delta, weight, 1e-5), expected)
    assert_close(x, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (257, 1025), (3, 14336)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    from pdserve_kernels.silu_mul import kernel, reference

    gate_up = normal(rows, 2 * width, dtype=dtype)
    assert_close(kernel.silu_mul(gate_up), reference.silu_mul(wide(gate_up)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (16, 1), (32, 8)])
@pytest.mark.parametrize("block_size", [16, 256])
def test_rope_kv_write(dim: int, heads: int, kv_heads: int, block_size: int, dtype: torch.dtype) -> None:
    from pdserve_kernels.rope_kv_write import kernel, reference

    tokens, blocks = 33, 40
    qkv = normal(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    cos, sin = (normal(64, dim // 2, dtype=torch.float32, seed=seed) for seed in (1, 2))
    query, key = (normal(dim, dtype=dtype, seed=seed) for seed in (3, 4))
    positions = torch.arange(tokens).cuda()
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(5))[:tokens].cuda()
    slots[::7] = -1
    kv = torch.full((blocks, 3, 2, kv_heads, block_size, dim), float("nan"), dtype=dtype, device="cuda")
    expected_kv = wide(kv[:, 1])
    expected = reference.rope_kv_write(
        wide(qkv),
        positions.cpu().numpy(),
        slots.cpu().numpy(),
        (wide(cos), wide(sin)),
        expected_kv,
        reference.HeadNorms(query=wide(query), key=wide(key), eps=1e-6),
    )
    norms = kernel.HeadNorms(query=query, key=key, eps=1e-6)
    assert_close(kernel.rope_kv_write(qkv, positions, slots, (cos, sin), kv[:, 1], norms), expected)
    written = ~np.isnan(expected_kv)
    assert np.array_equal(~np.isnan(wide(kv[:, 1])), written)
    assert_close(kv[:, 1][torch.from_numpy(written).cuda()], expected_kv[written])
    assert kv[:, ::2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 257])
@pytest.mark.parametrize(("columns", "depth"), [(6144, 4096), (1000, 1040), (31, 33)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_small_gemm(rows: int, columns: int, depth: int, deterministic: bool, dtype: torch.dtype) -> None:
    from pdserve_kernels.small_gemm import kernel, reference

    workspace = kernel.Workspace.on(torch.device("cuda"))
    x, factor = normal(rows, depth, dtype=dtype), normal(depth, dtype=dtype, seed=1)
    weight = normal(2 * columns, depth, dtype=dtype, seed=2, scale=depth**-0.5)
    stream = normal(rows, columns, dtype=dtype, seed=3)
    for _ in range(3):  # the workspace's counters must come back to zero
        got = kernel.small_gemm(
            x,
            weight,
            workspace,
            norm=(factor, 1e-5),
            gated=True,
            residual=stream,
            deterministic=deterministic,
        )
    expected = reference.small_gemm(wide(x), wide(weight), norm=(wide(factor), 1e-5), gated=True, residual=wide(stream))
    assert_close(got, expected)
    assert not workspace.counters.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deterministic_products_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    from pdserve_kernels.small_gemm import kernel

    workspace = kernel.Workspace.on(torch.device("cuda"))
    x, weight = normal(300, 4096, dtype=dtype), normal(1000, 4096, dtype=dtype, seed=1)
    together = kernel.small_gemm(x, weight, workspace, deterministic=True)
    for first, end in ((0, 1), (17, 34), (100, 300)):
        part = kernel.small_gemm(x[first:end].contiguous(), weight, workspace, deterministic=True)
        assert torch.equal(part, together[first:end])


@pytest.mark.parametrize("vocab", [301, 128_256])
def test_sampling_chooses_the_cpu_samplers_tokens(vocab: int) -> None:
    from pdserve.worker.kernel_sampler import KernelSampler
    from pdserve.worker.sampler import Sampler
    from tests.sampling_rows import random_init, row

    rng = Random(vocab)
    cpu, gpu = Sampler(vocab, torch.device("cpu")), KernelSampler(vocab, torch.device("cuda"))
    inits = [replace(random_init(rng, vocab), logprobs=True) for _ in range(64)]
    for step in range(4):
        logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(step)) * 3
        rows = [row(i, None if step else init, 10 + step) for i, init in enumerate(inits)]
        expected, got = cpu.sample(logits.clone(), rows, None), gpu.sample(logits.cuda(), rows, None)
        assert [o.token_ids for o in got] == [o.token_ids for o in expected]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
