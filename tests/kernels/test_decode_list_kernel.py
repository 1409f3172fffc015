"""The decode list's kernel writes the list that work_list.py's tensor operations make, interpreted."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve_kernels.paged_attention.decode_list import decode_work_list
from pdserve_kernels.paged_attention.work_list import Cut, Launch, WorkList, build_work_list
from tests.kernels.hopper import Build, compile_for_hopper
from tests.kernels.test_work_list import check_slots

LENS = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 700)), min_size=1, max_size=20)


def owned(work: WorkList, rows: list[int]) -> list[list[tuple[int, ...]]]:
    """Each program's items, but for the slots of their states; sequences by the row of their table."""
    items = work.items.tolist()
    return [
        [(rows[i[1]], *i[1:8], i[9]) for i in items[begin:end] if i[7]]
        for begin, end in pairwise(work.program_starts.tolist())
    ]


def expected_list(cut: Cut, lens: torch.Tensor) -> WorkList:
    units, split = len(lens) * cut.kv_heads, cut.split
    parts = (
        units if split is None else cut.kv_heads * sum(max(1, -(-n // (cut.kv_tile * split))) for n in lens.tolist())
    )
    items = units + cut.programs if split is None else parts
    launch = Launch(first_tile=0, tiles=len(lens), items=items, slots=2 * cut.programs if split is None else parts)
    return build_work_list(cut, launch, torch.arange(len(lens)), torch.ones_like(lens), lens)


def check(cut: Cut, lengths: list[int]) -> None:
    rows = [3 * i + 1 for i in range(len(lengths))]
    lens = torch.tensor(lengths)
    work = decode_work_list(cut, torch.tensor(rows), lens, longest=max(lengths))
    assert owned(work, rows) == owned(expected_list(cut, lens), rows)
    written = [item for item in work.items.tolist() if item[7] > 0]
    assert [item[0] for item in written] == [rows[item[1]] for item in written]
    check_slots(work)


@settings(max_examples=40, deadline=None)
@given(lens=LENS, kv_heads=st.integers(1, 3), programs=st.integers(1, 40), kv_tile=st.sampled_from([16, 32]))
def test_the_balanced_list_is_that_of_the_tensor_operations(
    lens: list[int], kv_heads: int, programs: int, kv_tile: int
) -> None:
    check(Cut(query_tile=4, kv_tile=kv_tile, kv_heads=kv_heads, programs=programs), lens)


@settings(max_examples=20, deadline=None)
@given(lens=LENS, kv_heads=st.integers(1, 3), programs=st.integers(1, 40), split=st.integers(1, 4))
def test_the_fixed_list_is_that_of_the_tensor_operations(
    lens: list[int], kv_heads: int, programs: int, split: int
) -> None:
    check(Cut(query_tile=4, kv_tile=16, kv_heads=kv_heads, programs=programs, split=split), lens)


@pytest.mark.parametrize("split", [None, 16])
def test_a_large_bucket_of_uneven_lengths(split: int | None) -> None:
    lens = [(37 * i * i) % 2000 for i in range(63)] + [100_000]
    check(Cut(query_tile=4, kv_tile=64, kv_heads=8, programs=264, split=split), lens)


def test_it_compiles_for_hopper_without_spills() -> None:
    builds = [
        Build(
            module="pdserve_kernels.paged_attention.decode_list",
            kernel="decode_list_kernel",
            signature=dict.fromkeys(("table_rows_ptr", "kv_lens_ptr"), "*i64:16")
            | dict.fromkeys(("items_ptr", "program_starts_ptr"), "*i32:16")
            | dict.fromkeys(("sequences", "kv_heads", "programs", "num_items"), "i32"),
            constants={"KV_TILE": 64, "SPLIT": split, "N": 256, "ITEMS": 32},
        )
        for split in (0, 16)
    ]
    for built in compile_for_hopper(*builds):
        assert built.stack == 0
