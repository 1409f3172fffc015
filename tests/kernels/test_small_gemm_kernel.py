"""Few-row products: the interpreted kernel against float64, its tilings, and rows that know nothing of each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve_kernels.small_gemm import kernel, reference
from pdserve_kernels.small_gemm.tiling import MAX_SPLITS, MIN_SPLIT_DEPTH, Tiling, tiling
from tests.kernels.arrays import Draws, assert_close, wide

pytestmark = pytest.mark.usefixtures("poisoned")
EVERYTHING = ("bias", "norm", "gated", "residual")


def cut(splits: int, block_m: int = 16) -> Tiling:
    return Tiling(block_m=block_m, block_n=32, block_k=64, splits=splits, num_warps=4, num_stages=3)


def check(
    rows: int,
    columns: int,
    depth: int,
    *parts: str,
    splits: int = 1,
    dtype: torch.dtype = torch.float32,
    workspace: kernel.Workspace | None = None,
) -> None:
    draws, gated = Draws(depth, dtype), "gated" in parts
    x, weight = draws.normal(rows, depth), draws.normal(columns * (2 if gated else 1), depth, scale=depth**-0.5)
    bias = draws.normal(weight.shape[0]) if "bias" in parts else None
    norm = draws.normal(depth) if "norm" in parts else None
    residual = draws.normal(rows, columns) if "residual" in parts else None
    expected = reference.small_gemm(
        wide(x),
        wide(weight),
        bias=None if bias is None else wide(bias),
        norm=None if norm is None else (wide(norm), 1e-5),
        gated=gated,
        residual=None if residual is None else wide(residual),
    )
    result = kernel.small_gemm(
        x,
        weight,
        workspace or kernel.Workspace.on(x.device),
        bias=bias,
        norm=None if norm is None else (norm, 1e-5),
        gated=gated,
        residual=residual,
        cut=cut(splits),
    )
    assert_close(result, expected, places=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_it_equals_the_reference(dtype: torch.dtype, splits: int) -> None:
    check(1, 40, 70, splits=splits, dtype=dtype)
    check(3, 33, 301, *EVERYTHING, splits=splits, dtype=dtype)


@pytest.mark.parametrize("part", EVERYTHING)
def test_each_part_alone_equals_the_reference(part: str) -> None:
    check(17, 37, 130, part, splits=2)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 257])
@pytest.mark.parametrize(("columns", "depth", "splits"), [(1, 1, 1), (65, 127, 2), (31, 1025, 8)])
def test_it_equals_the_reference_on_odd_shapes(rows: int, columns: int, depth: int, splits: int) -> None:
    check(rows, columns, depth, *EVERYTHING, splits=splits)


def test_a_workspace_serves_one_product_after_the_other() -> None:
    workspace = kernel.Workspace.on(torch.device("cpu"))
    check(2, 40, 200, splits=3, workspace=workspace)
    check(17, 70, 300, *EVERYTHING, splits=2, workspace=workspace)
    check(1, 40, 200, "norm", splits=3, workspace=workspace)
    assert not workspace.counters.any()


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(splits: int) -> None:
    draws, workspace = Draws(5), kernel.Workspace.on(torch.device("cpu"))
    x, weight, norm = draws.normal(20, 300), draws.normal(48, 300), (draws.normal(300), 1e-6)
    together = kernel.small_gemm(x, weight, workspace, norm=norm, cut=cut(splits))
    for row in (0, 7, 19):
        alone = kernel.small_gemm(x[row : row + 1].clone(), weight, workspace, norm=norm, cut=cut(splits))
        assert torch.equal(together[row : row + 1], alone)


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 300_000), st.integers(1, 30_000), st.booleans())
def test_a_deterministic_tiling_knows_nothing_of_the_rows(
    rows: int, others: int, columns: int, depth: int, gated: bool
) -> None:
    chosen = tiling(rows, columns, depth, gated=gated, deterministic=True)
    assert chosen == tiling(others, columns, depth, gated=gated, deterministic=True)


@given(st.integers(1, 512), st.integers(1, 300_000), st.integers(1, 30_000), st.booleans(), st.booleans())
def test_splits_are_few_and_long(rows: int, columns: int, depth: int, gated: bool, deterministic: bool) -> None:
    splits = tiling(rows, columns, depth, gated=gated, deterministic=deterministic).splits
    assert splits == 1 or (splits <= MAX_SPLITS and depth / splits >= MIN_SPLIT_DEPTH)


def test_no_rows_are_no_work_and_what_does_not_fit_is_refused() -> None:
    workspace = kernel.Workspace.on(torch.device("cpu"))
    weight = torch.ones(6, 4)
    assert kernel.small_gemm(torch.ones(0, 4), weight, workspace, gated=True).shape == (0, 3)
    with pytest.raises(ValueError, match="does not apply"):
        kernel.small_gemm(torch.ones(1, 5), weight, workspace)
    with pytest.raises(ValueError, match="contiguous"):
        kernel.small_gemm(torch.ones(1, 6), weight.t(), workspace)


def test_the_reference_is_what_a_layer_of_torch_computes() -> None:
    draws = Draws(9, torch.float64)
    x, weight, bias = (draws.normal(*shape) for shape in ((3, 8), (10, 8), (10,)))
    gate, up = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    np.testing.assert_allclose(
        reference.small_gemm(wide(x), wide(weight), bias=wide(bias), gated=True), wide(expected), rtol=1e-12
    )
