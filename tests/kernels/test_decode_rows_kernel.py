"""The table of decoding sequences: the interpreted kernels against NumPy, padding included."""

import numpy as np
import pytest
import torch

from pdserve_kernels.decode_rows import kernel, reference
from pdserve_kernels.decode_rows.columns import MIN_P, POSITION, TABLE, TEMPERATURE
from tests.kernels.hopper import Build, compile_for_hopper

BLOCK_SIZE, MAX_BLOCKS, ROWS = 16, 9, 80


def table(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 1 << 20, (ROWS, TABLE + MAX_BLOCKS))
    cells[:, POSITION] = rng.integers(0, MAX_BLOCKS * BLOCK_SIZE, ROWS)
    cells[:, TEMPERATURE : MIN_P + 1] = rng.random((ROWS, 3)).astype(np.float32).view(np.int32)
    return cells


def order(size: int, seed: int) -> np.ndarray:
    """Distinct rows with padding between and behind."""
    rows = np.random.default_rng(seed).permutation(ROWS)[:size]
    rows[2::5] = -1
    return rows


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65])
def test_inputs_are_those_of_the_reference(size: int, poisoned: None) -> None:
    cells, rows = table(size), order(size, size)
    inputs = kernel.decode_inputs(torch.from_numpy(cells), torch.from_numpy(rows), BLOCK_SIZE)
    for name, expected in reference.decode_inputs(cells, rows, BLOCK_SIZE).items():
        np.testing.assert_array_equal(getattr(inputs, name).numpy(), expected, err_msg=name)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("size", [0, 1, 65])
def test_tokens_go_to_their_rows_and_no_others(size: int, moves: bool, poisoned: None) -> None:
    cells, rows, rng = table(3), order(size, 4), np.random.default_rng(5)
    tokens, logprobs, peaks = rng.integers(0, 99, size), rng.random(size, np.float32), rng.random(size, np.float32)
    peaks[1::7], peaks[3::7], peaks[4::7] = np.nan, np.inf, -np.inf
    changed = torch.from_numpy(cells.copy())
    tensors = [torch.from_numpy(x) for x in (rows, tokens, logprobs, peaks)]
    out = kernel.advance(changed, *tensors, moves=moves)
    expected = reference.advance(cells, rows, tokens, logprobs, peaks, moves=moves)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(changed.numpy(), cells)


def test_both_compile_for_hopper_without_spills() -> None:
    integers = "*i64:16"
    tensors = ("table", "order", "tokens", "positions", "slots", "kv_lens", "table_rows", "controls")
    inputs = Build(
        module=kernel.__name__,
        kernel="inputs_kernel",
        signature=dict.fromkeys((f"{name}_ptr" for name in tensors), integers)
        | {"knobs_ptr": "*fp32:16", "size": "i32", "width": "i32", "block_size": "i32:16"},
        constants={"ROWS": kernel.ROWS},
    )
    advance = Build(
        module=kernel.__name__,
        kernel="advance_kernel",
        signature=dict.fromkeys(("table_ptr", "order_ptr", "tokens_ptr"), integers)
        | {"logprobs_ptr": "*fp32:16", "peaks_ptr": "*bf16:16", "out_ptr": "*fp64:16", "size": "i32", "width": "i32"},
        constants={"ROWS": kernel.ROWS, "MOVES": True},
    )
    assert all(built.stack == 0 for built in compile_for_hopper(inputs, advance))
