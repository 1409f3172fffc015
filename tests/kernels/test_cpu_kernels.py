"""The CPU kernels against float64, on odd shapes, in memory where NaN lies beside everything they may read."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.attention.arrays import LayerMemory, as_array, float32
from pdserve_kernels.fused_norm import reference as norm_reference
from pdserve_kernels.rope_kv_write import reference as rope_reference
from pdserve_kernels.silu_mul import reference as silu_reference
from tests.kernels.arrays import Draws, assert_close, wide
from tests.kernels.attention_cases import PADDING_ROWS, Shape, Step, make_step

if not find_spec("numba"):
    pytest.skip("needs Numba", allow_module_level=True)

from pdserve.attention.base import AttentionMetadata
from pdserve.attention.cpu_backend import CpuAttention
from pdserve_kernels.cpu.layer import rms_norm, rope_kv_write, silu_mul
from pdserve_kernels.cpu.product import product
from pdserve_kernels.cpu.tile_sums import TILE, multiplies_bfloat16

DTYPES = [torch.float32, torch.bfloat16]
AROUND_SPANS = [(1, 15), (1, 16), (2, 17), (1, 1), (3, 33), (40, 40), (1, 600)]


def attended(step: Step) -> Tensor:
    metadata = AttentionMetadata(
        block_tables=torch.from_numpy(step.tables),
        query_starts=torch.from_numpy(step.query_starts),
        kv_lens=torch.from_numpy(step.kv_lens),
        slots=torch.empty(0, dtype=torch.int64),
        query_lens_host=tuple(step.query_lens.tolist()),
        kv_lens_host=tuple(step.kv_lens.tolist()),
    )
    return CpuAttention().plan(metadata).attend(step.q, step.kv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [4, 16, 24, 256])
@pytest.mark.parametrize(("head_dim", "kv_heads", "group"), [(64, 2, 7), (96, 1, 16), (24, 3, 1), (256, 2, 2)])
def test_attention_equals_the_reference(
    head_dim: int, kv_heads: int, group: int, block_size: int, dtype: torch.dtype
) -> None:
    shape = Shape(head_dim=head_dim, kv_heads=kv_heads, group=group, block_size=block_size, dtype=dtype)
    step = make_step(shape, AROUND_SPANS)
    out = attended(step)
    assert_close(out[:-PADDING_ROWS], step.expected(), places=2)
    assert not out[-PADDING_ROWS:].any()


@pytest.mark.parametrize("block_major", [True, False])
def test_a_tokens_attention_has_the_same_bits_alone_and_in_either_memory(block_major: bool) -> None:
    together = make_step(Shape(head_dim=64, block_major=block_major), [(33, 40)])
    whole = attended(together)[:33]
    for token in range(33):
        metadata = AttentionMetadata(
            block_tables=torch.from_numpy(together.tables),
            query_starts=torch.tensor([0, 1]),
            kv_lens=torch.tensor([8 + token]),
            slots=torch.empty(0, dtype=torch.int64),
            query_lens_host=(1,),
            kv_lens_host=(8 + token,),
        )
        alone = CpuAttention().plan(metadata).attend(together.q[token : token + 1], together.kv)
        assert torch.equal(alone[0], whole[token])


def test_nan_in_a_key_reaches_the_result() -> None:
    step = make_step(Shape(head_dim=64), [(1, 20)])
    step.kv[int(step.tables[0, 0]), 0, 0, 3, 5] = float("nan")
    out = attended(step)
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 77), (5, 896)])
def test_norm_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    draws = Draws(width, dtype)
    x, weight = draws.normal(rows, width), draws.normal(width)
    out = torch.full_like(x, float("nan"))
    rms_norm(as_array(x), as_array(weight), float32(1e-6), as_array(out))
    assert_close(out, norm_reference.rms_norm(wide(x), wide(weight), 1e-6))


def in_tiles(weight: Tensor) -> Tensor:
    """(width, depth) in the order product reads it, NaN beyond the width."""
    width, depth = weight.shape
    tiles = -(-width // TILE)
    padded = torch.full((tiles * TILE, depth), float("nan"), dtype=weight.dtype)
    padded[:width] = weight
    together = 2 if weight.dtype is torch.bfloat16 else 1
    return padded.view(tiles, TILE, depth // together, together).permute(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 32])
@pytest.mark.parametrize(("width", "depth", "part"), [(1, 2, 2), (63, 88, 88), (130, 100, 32), (64, 1536, 1024)])
def test_a_product_equals_the_reference(
    width: int, depth: int, part: int, rows: int, biased: bool, dtype: torch.dtype
) -> None:
    if dtype is torch.bfloat16 and not multiplies_bfloat16():
        pytest.skip("this processor has no AVX512_BF16")
    draws = Draws(width, dtype)
    x, weight, bias = draws.normal(rows, depth), draws.normal(width, depth), draws.normal(width)
    out = torch.full((rows, width), float("nan"), dtype=dtype)
    product(as_array(x), as_array(in_tiles(weight)), as_array(bias), biased, part, as_array(out))
    expected = wide(x) @ wide(weight).T + (wide(bias) if biased else 0)
    torch.testing.assert_close(out.double(), torch.from_numpy(expected), atol=1e-4 * depth**0.5, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 77), (2, 1024)])
def test_gate_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = Draws(width, dtype).normal(rows, 2 * width, scale=9)
    out = torch.full((rows, width), float("nan"), dtype=dtype)
    silu_mul(as_array(gate_up), as_array(out))
    assert_close(out, silu_reference.silu_mul(wide(gate_up)), places=2)


def test_gates_far_from_zero_are_finite_and_nan_stays() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, float("nan"), 3.0, 3.0, 3.0, 3.0]])
    out = torch.empty(1, 4)
    silu_mul(gate_up.numpy(), out.numpy())
    assert out[0, :3].tolist() == pytest.approx([0.0, 600.0, 0.0], abs=1e-30)
    assert out[0, 3].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_rope_and_write_equal_the_reference(normed: bool, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, dim, block_size = 7, 6, 2, 64, 16
    draws = Draws(dim, dtype)
    qkv = draws.normal(tokens + PADDING_ROWS, heads + 2 * kv_heads, dim)
    cos, sin = (draws.normal(50, dim // 2, dtype=torch.float32) for _ in range(2))
    weights = draws.normal(dim), draws.normal(dim)
    positions = np.arange(3, 3 + tokens + PADDING_ROWS)
    slots = np.random.default_rng(0).permutation(5 * block_size)[:tokens]
    kv = torch.full((5, 3, 2, kv_heads, block_size, dim), float("nan"), dtype=dtype)[:, 1]
    before = wide(kv).copy()
    norms = rope_reference.HeadNorms(query=wide(weights[0]), key=wide(weights[1]), eps=1e-6) if normed else None
    expected = rope_reference.rope_kv_write(
        wide(qkv[:tokens]), positions[:tokens], slots, (wide(cos), wide(sin)), before, norms
    )
    memory, q = LayerMemory.of(kv), torch.full((tokens + PADDING_ROWS, heads, dim), float("nan"), dtype=dtype)
    rope_kv_write(
        as_array(qkv),
        positions,
        slots,
        cos.numpy(),
        sin.numpy(),
        as_array(weights[0]),
        as_array(weights[1]),
        normed,
        float32(1e-6),
        memory.elements,
        memory.block_stride,
        memory.kv_heads,
        memory.block_size,
        as_array(q),
    )
    assert_close(q[:tokens], expected, places=2)
    assert not q[tokens:].any()
    assert np.array_equal(np.isnan(wide(kv)), np.isnan(before))
    written = ~np.isnan(before)
    assert_close(kv[torch.from_numpy(written)], before[written], places=2)


def test_memory_whose_blocks_are_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        LayerMemory.of(torch.empty(4, 2, 2, 16, 8).transpose(2, 3))


def test_code_from_the_cache_computes_what_freshly_compiled_code_does(tmp_path: Path) -> None:
    """Engines on other machines compile their own, and are to compute the same bits."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.cpu_kernel_bits"]
    fresh, cached = (
        subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=240).stdout for _ in "12"
    )
    assert any(tmp_path.rglob("*.nbc"))
    assert fresh
    assert fresh == cached
