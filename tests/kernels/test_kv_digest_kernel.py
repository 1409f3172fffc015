"""The keyed sum's kernel: in the interpreter it equals the reference; for Hopper it compiles without spills."""

import numpy as np
import pytest
import torch

from pdserve_kernels.kv_digest import kernel, reference
from tests.kernels.hopper import SHARED_BYTES, Build, compile_for_hopper


@pytest.mark.parametrize(
    "lengths",
    [[8], [8 * kernel.PROGRAM_WORDS + 16], [24, 8 * kernel.TILE, 4096, 8 * kernel.PROGRAM_WORDS]],
    ids=["one word", "more than one program", "spans of many lengths"],
)
def test_the_interpreted_kernel_equals_the_reference(lengths: list[int]) -> None:
    rng = np.random.default_rng(len(lengths))
    memory = rng.integers(0, 256, 8 * 20_003 + 5, dtype=np.uint8)
    # Out of order and with gaps, as the blocks of a region lie.
    ends = np.cumsum([length + 40 for length in reversed(lengths)])[::-1]
    spans = np.array(lengths, dtype=np.uint64)
    offsets = ends.astype(np.uint64) - spans
    expected = reference.keyed_sum((memory[o : o + n] for o, n in zip(offsets, spans, strict=True)), 2**63 + 9)
    assert kernel.keyed_sum(torch.from_numpy(memory), offsets, spans, 2**63 + 9) == expected


def test_no_spans_have_the_digest_of_no_bytes() -> None:
    none = np.zeros(0, dtype=np.uint64)
    assert kernel.keyed_sum(torch.zeros(8, dtype=torch.uint8), none, none, 3) == reference.keyed_sum((), 3)


def test_spans_that_are_not_aligned_words_are_refused() -> None:
    for offset, length in ((4, 8), (8, 12)):
        span = np.array([offset], dtype=np.uint64), np.array([length], dtype=np.uint64)
        with pytest.raises(ValueError, match="multiple of the 8"):
            kernel.keyed_sum(torch.zeros(64, dtype=torch.uint8), *span, 0)


def test_it_compiles_for_hopper_without_local_memory() -> None:
    (built,) = compile_for_hopper(
        Build(
            module=kernel.__name__,
            kernel="keyed_sum_kernel",
            signature=dict.fromkeys(("words_ptr", "keys_ptr", "shares_ptr", "sums_ptr"), "*i64:16"),
            constants={"TILE": kernel.TILE, "PASSES": kernel.PASSES},
        )
    )
    assert "atom" in built.ptx
    assert built.stack == 0
    assert built.shared <= SHARED_BYTES
