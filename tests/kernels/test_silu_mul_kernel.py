"""silu(gate) · up: the interpreted kernel against float64."""

import pytest
import torch

from pdserve_kernels.silu_mul import kernel, reference
from tests.kernels.arrays import Draws, assert_close, wide

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 77), (2, kernel.TILE + 3)])
def test_it_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = Draws(width, dtype).normal(rows, 2 * width, scale=3)
    assert_close(kernel.silu_mul(gate_up), reference.silu_mul(wide(gate_up)), places=2)


@pytest.mark.filterwarnings("ignore:overflow")  # exp(200) is infinite on a GPU, too, and its reciprocal 0
def test_gates_far_from_zero_are_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    assert kernel.silu_mul(gate_up).tolist() == [[0.0, 600.0, 0.0]]


def test_no_rows_are_no_work_and_odd_columns_are_refused() -> None:
    assert kernel.silu_mul(torch.ones(0, 4)).shape == (0, 2)
    with pytest.raises(ValueError, match="as many gates as values"):
        kernel.silu_mul(torch.ones(1, 3))
