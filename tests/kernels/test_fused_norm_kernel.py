"""Residual add and RMSNorm: the interpreted kernel against float64, and rows that know nothing of each other."""

import pytest
import torch

from pdserve_kernels.fused_norm import kernel, reference
from tests.kernels.arrays import Draws, assert_close, wide

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(rows: int, width: int, dtype: torch.dtype, *, with_delta: bool) -> None:
    draws = Draws(width, dtype)
    x, weight = draws.normal(rows, width), draws.normal(width)
    delta = draws.normal(rows, width) if with_delta else None
    total, expected = reference.add_norm(wide(x), None if delta is None else wide(delta), wide(weight), 1e-5)
    normed = kernel.add_norm(x, delta, weight, 1e-5)
    assert_close(x, total)
    assert_close(normed, expected, places=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 77), (5, 1025)])
def test_it_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    check(rows, width, dtype, with_delta=True)
    check(rows, width, dtype, with_delta=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(257, 63), (2, 4096), (1, 16384), (33, 5119)])
def test_it_equals_the_reference_on_large_shapes(rows: int, width: int, dtype: torch.dtype) -> None:
    check(rows, width, dtype, with_delta=True)


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it() -> None:
    draws = Draws(1)
    x, delta, weight = draws.normal(5, 300), draws.normal(5, 300), draws.normal(300)
    alone = kernel.add_norm(x[2:3].clone(), delta[2:3].clone(), weight, 1e-6)
    assert torch.equal(kernel.add_norm(x, delta, weight, 1e-6)[2:3], alone)


def test_no_rows_are_no_work_and_what_does_not_fit_is_refused() -> None:
    weight = torch.ones(4)
    assert kernel.add_norm(torch.ones(0, 4), None, weight, 0.0).shape == (0, 4)
    with pytest.raises(ValueError, match="contiguous"):
        kernel.add_norm(torch.ones(4, 4).t(), None, weight, 0.0)
    with pytest.raises(ValueError, match="do not fit one program"):
        kernel.add_norm(torch.ones(1, kernel.MAX_WIDTH + 1), None, weight, 0.0)
