"""Paged attention on a GPU, at the sizes of real models, against the float64 reference and against itself."""

import pytest
import torch

from pdserve_kernels.paged_attention.tuning import FIXED_SPLIT, Purpose
from tests.kernels.attention_cases import PADDING_ROWS, Shape, Step, attend, make_step, tuning_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def on_gpu(step: Step) -> Step:
    return Step(shape=step.shape, lens=step.lens, q=step.q.cuda(), kv=step.kv.cuda(), tables=step.tables)


def run(step: Step, purpose: Purpose) -> torch.Tensor:
    tuning = tuning_of(step.shape, purpose)
    programs = torch.cuda.get_device_properties(0).multi_processor_count * tuning.programs
    split = FIXED_SPLIT // tuning.kv_tile if purpose is Purpose.INVARIANT else None
    return attend(step, tuning, split=split, programs=programs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_major", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "group", "block_size"), [(128, 4, 16), (64, 1, 32), (96, 3, 64), (256, 8, 256), (128, 16, 128)]
)
@pytest.mark.parametrize("purpose", list(Purpose))
def test_it_equals_the_reference(
    purpose: Purpose, head_dim: int, group: int, block_size: int, block_major: bool, dtype: torch.dtype
) -> None:
    shape = Shape(head_dim=head_dim, group=group, block_size=block_size, block_major=block_major, dtype=dtype)
    lens = [(1, 1), (1, 8001), (130, 130), (64, 1500), (1, block_size), (3, block_size + 1), (1, 0)]
    step = make_step(shape, lens)
    out = run(on_gpu(step), purpose).cpu()
    assert out[-PADDING_ROWS:].isnan().all()
    expected = torch.from_numpy(step.expected())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[:-PADDING_ROWS].double(), expected, atol=tolerance, rtol=tolerance)


def test_repeated_runs_give_the_same_bits() -> None:
    """Parts are folded in their order, whichever program comes last."""
    shape = Shape(head_dim=128, kv_heads=8, dtype=torch.bfloat16)
    step = on_gpu(make_step(shape, [(1, 9000), *[(1, 300)] * 30]))
    first = run(step, Purpose.DECODE)[:-PADDING_ROWS]
    assert all(torch.equal(run(step, Purpose.DECODE)[:-PADDING_ROWS], first) for _ in range(50))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_with_a_fixed_split_decode_chunks_and_batch_change_no_bit(head_dim: int) -> None:
    shape = Shape(head_dim=head_dim, dtype=torch.bfloat16)
    length = 2 * FIXED_SPLIT + 77
    whole = make_step(shape, [(length, length)])
    expected = run(on_gpu(whole), Purpose.INVARIANT)[:-PADDING_ROWS]
    for first, new in ((0, 100), (FIXED_SPLIT - 3, 7), (length - 1, 1)):
        chunk = torch.cat((whole.q[first : first + new], whole.q[:40], whole.q[-PADDING_ROWS:]))
        # The second sequence is the first one's beginning: it shares its blocks.
        tables = whole.tables.repeat(2, axis=0)
        step = Step(shape=shape, lens=((new, first + new), (40, 40)), q=chunk, kv=whole.kv, tables=tables)
        out = run(on_gpu(step), Purpose.INVARIANT)[:-PADDING_ROWS]
        assert torch.equal(out[:new], expected[first : first + new])
        assert torch.equal(out[new:], expected[:40])
