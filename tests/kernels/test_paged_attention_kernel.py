"""Paged attention's kernel: in the interpreter it equals the float64 reference; for Hopper it compiles as tuned."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve_kernels.paged_attention import kernel
from pdserve_kernels.paged_attention.tuning import Purpose, Tuning, tuning_for
from tests.kernels.attention_cases import PADDING_ROWS, Shape, Step, attend, make_step, tuning_of
from tests.kernels.hopper import SHARED_BYTES, Build, compile_for_hopper

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INVARIANT_SPLIT = 2


def check(step: Step, tuning: Tuning, split: int | None = None, tolerance: float | None = None) -> None:
    out = attend(step, tuning, split=split)
    assert out[-PADDING_ROWS:].isnan().all(), "rows of no sequence stay as they are"
    expected = torch.from_numpy(step.expected())
    tolerance = tolerance or TOLERANCE[step.shape.dtype]
    torch.testing.assert_close(out[:-PADDING_ROWS].double(), expected, atol=tolerance, rtol=tolerance)


def around(*boundaries: int) -> list[int]:
    return sorted({max(1, boundary + off) for boundary in boundaries for off in (-1, 0, 1)})


@pytest.mark.parametrize(
    "shape",
    [
        Shape(head_dim=128),
        Shape(head_dim=64, group=1, block_size=48, block_major=False),
        Shape(head_dim=96, group=7, block_size=64),
        Shape(head_dim=256, group=16, kv_heads=1, block_size=256),
    ],
    ids=str,
)
def test_decode_of_very_uneven_lengths_equals_the_reference(shape: Shape) -> None:
    tuning = tuning_of(shape, Purpose.DECODE)
    lens = [1, *around(shape.block_size, tuning.kv_tile), 5 * tuning.kv_tile + 3]
    check(make_step(shape, [(1, length) for length in lens] + [(1, 0)]), tuning)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(head_dim=128, block_major=False),
        Shape(head_dim=64, group=1, block_size=32),
        Shape(head_dim=96, group=5, block_size=24),
        Shape(head_dim=256, kv_heads=1, block_size=128),
    ],
    ids=str,
)
def test_prefill_after_any_prefix_equals_the_reference(shape: Shape) -> None:
    tuning = tuning_of(shape, Purpose.PREFILL)
    chunk = tuning.rows // shape.group
    check(make_step(shape, [(chunk + 1, chunk + 1), (1, 70), (3, 3 * tuning.kv_tile + 1), (17, 17)]), tuning)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("purpose", list(Purpose))
def test_16_bit_types_round_no_more_than_they_must(purpose: Purpose, dtype: torch.dtype) -> None:
    shape = Shape(head_dim=64, dtype=dtype, kv_heads=1)
    check(make_step(shape, [(1, 200), (9, 40)]), tuning_of(shape, purpose))


def test_many_parts_are_folded_in_several_turns() -> None:
    tuning = Tuning(rows=16, kv_tile=16, num_warps=4, num_stages=2, fold=2, fold_dim=32)
    shape = Shape(head_dim=64, kv_heads=1)
    check(make_step(shape, [(1, 16 * 11 + 5), (3, 20)]), tuning, split=1)


def test_scores_far_from_zero_do_not_overflow() -> None:
    shape = Shape(head_dim=64)
    step = make_step(shape, [(1, 150), (40, 90)])
    step.q.mul_(300)
    check(step, tuning_of(shape, Purpose.PREFILL), tolerance=2e-3)


def run_invariant(step: Step, tuning: Tuning, programs: int) -> list[torch.Tensor]:
    """Results by sequence."""
    out = attend(step, tuning, split=INVARIANT_SPLIT, programs=programs)[:-PADDING_ROWS]
    return list(torch.split(out, step.query_lens.tolist()))


@pytest.mark.usefixtures("one_order_of_sums")
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_with_a_fixed_split_batch_chunks_and_programs_change_no_bit(data: st.DataObject) -> None:
    """Sequence 0 alone in one piece, against the same sequence in chunks among others."""
    check_invariance(data, Tuning(rows=16, kv_tile=16, num_warps=4, num_stages=2), Shape(head_dim=64, kv_heads=1))


@pytest.mark.usefixtures("one_order_of_sums")
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_the_tuned_fixed_split_changes_no_bit(head_dim: int, data: st.DataObject) -> None:
    shape = Shape(head_dim=head_dim, kv_heads=1)
    check_invariance(data, tuning_of(shape, Purpose.INVARIANT), shape)


def check_invariance(data: st.DataObject, tuning: Tuning, shape: Shape) -> None:
    length = data.draw(st.integers(1, 5 * tuning.kv_tile), label="length")
    (alone,) = run_invariant(make_step(shape, [(length, length)]), tuning, programs=3)
    done = 0
    while done < length:
        new = min(data.draw(st.sampled_from([1, 5, 16, 33, length])), length - done)
        others = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), max_size=2))
        lens = [(new, done + new), *((a, a + b) for a, b in others)]
        # Of the sequence, a longer total has other random queries: take them from the whole.
        step = make_step(shape, lens)
        whole = make_step(shape, [(length, length)])
        step.q[:new] = whole.q[done : done + new]
        place = torch.arange(done + new)
        size = shape.block_size
        source, target = (torch.from_numpy(s.tables[0])[place // size] for s in (whole, step))
        step.kv[target, :, :, place % size] = whole.kv[source, :, :, place % size]
        chunk, *_ = run_invariant(step, tuning, programs=data.draw(st.integers(1, 9)))
        assert torch.equal(chunk, alone[done : done + new])
        done += new


@pytest.mark.slow
@pytest.mark.parametrize("purpose", list(Purpose))
@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_all_sizes_equal_the_reference(head_dim: int, group: int, purpose: Purpose) -> None:
    # Block sizes rotate through groups and head dimensions.
    block_size = (16, 40, 128, 256)[(group + head_dim // 32) % 4]
    shape = Shape(head_dim=head_dim, block_size=block_size, group=group, kv_heads=1 + group % 2)
    tuning = tuning_of(shape, purpose)
    tile = tuning.rows // group
    lens = [(1, length) for length in around(tuning.kv_tile, block_size)] + [(tile + 1, block_size + tile)]
    check(make_step(shape, lens), tuning, split=INVARIANT_SPLIT if purpose is Purpose.INVARIANT else None)


def hopper_build(purpose: Purpose, head_dim: int, group: int, block_size: int, kind: str = "bf16") -> Build:
    tuning = tuning_for(purpose, head_dim, group, 4 if kind == "fp32" else 2)
    strides = ("q_token", "q_head", "out_token", "out_head", "kv", "head", "slot")
    return Build(
        module=kernel.__name__,
        kernel="paged_attention_kernel",
        signature=dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), f"*{kind}:16")
        | dict.fromkeys(("items_ptr", "program_starts_ptr", "arrivals_ptr"), "*i32:16")
        | dict.fromkeys(("accs_ptr", "peaks_ptr", "totals_ptr"), "*fp32:16")
        | {f"stride_{name}": "i32:16" for name in strides}
        | {"stride_block": "i64:16", "tables_ptr": "*i64:16", "stride_table": "i32", "scale": "fp32"},
        constants=kernel.constants(tuning, head_dim=head_dim, group=group, block_size=block_size, upcast=False),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


def check_builds(sizes: Sequence[tuple[Purpose, int, int, int]]) -> None:
    for size, built in zip(sizes, compile_for_hopper(*(hopper_build(*size) for size in sizes)), strict=True):
        purpose, head_dim, group, _ = size
        tuning = tuning_for(purpose, head_dim, group, 2)
        assert built.stack == 0, f"{size} spills"
        assert built.shared <= SHARED_BYTES
        assert built.programs_per_multiprocessor >= tuning.programs
        assert ("wgmma.mma_async" in built.ptx) == (purpose is not Purpose.DECODE)
        assert "cp.async.cg.shared.global" in built.ptx, "KV must be loaded ahead, 16 bytes at a time"
        # Stores of a part, then the barrier, then the count that releases them.
        assert "atom.global.gpu.acq_rel" in built.ptx


def test_the_most_common_sizes_compile_for_hopper_as_tuned() -> None:
    check_builds([(purpose, 128, 4, 16) for purpose in Purpose])


@pytest.mark.slow
@pytest.mark.parametrize("purpose", list(Purpose))
def test_every_tuning_compiles_for_hopper_as_tuned(purpose: Purpose) -> None:
    sizes = [(dim, 4, block) for dim in (64, 96, 128, 256) for block in (16, 256)]
    groups = [(dim, group, 64) for dim in (128, 256) for group in (1, 7, 16)]
    check_builds([(purpose, *size) for size in sizes + groups])
