"""Work lists: everything is attended to exactly once, by equal shares, or by parts that follow from KV indices."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve_kernels.paged_attention import work_list
from pdserve_kernels.paged_attention.work_list import Cut, WorkList, build_work_list, launches

Lens = list[tuple[int, int]]
LENS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 90)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    min_size=1,
    max_size=12,
)


def build(cut: Cut, lens: Lens) -> list[WorkList]:
    new, total = (np.array(x) for x in zip(*lens, strict=True))
    starts = new.cumsum() - new
    tensors = [torch.from_numpy(x) for x in (starts, new, total)]
    return [build_work_list(cut, launch, *tensors) for launch in launches(cut, new, total)]


def items_of(work: WorkList) -> list[list[int]]:
    return [item for item in work.items.tolist() if item[7]]


def shares(cut: Cut, work: WorkList) -> NDArray[np.int64]:
    """KV tiles of each program; also: its items are where program_starts says, and every item is some program's."""
    starts, items = work.program_starts.tolist(), work.items.tolist()
    assert starts == sorted(starts)
    owned = [items[begin:end] for begin, end in pairwise(starts)]
    assert sum(len([item for item in mine if item[7]]) for mine in owned) == len(items_of(work))
    return np.array([sum(max(1, -(-(i[6] - i[5]) // cut.kv_tile)) for i in mine if i[7]) for mine in owned])


def check_coverage(cut: Cut, lens: Lens, work: list[WorkList]) -> None:
    seen: Counter[tuple[int, int, int]] = Counter()
    row_of = np.cumsum([0, *(new for new, _ in lens)])
    for sequence, row, tokens, position, head, first, end, *_ in (item for w in work for item in items_of(w)):
        new, total = lens[sequence]
        assert position == total - new + (row - row_of[sequence])
        assert first % cut.kv_tile == 0
        assert end <= position + tokens <= total
        for token in range(row, row + tokens):
            seen.update((token, head, index) for index in range(first, end))
    expected = {
        (int(row_of[sequence]) + i, head, index): 1
        for sequence, (new, total) in enumerate(lens)
        for i in range(new)
        for head in range(cut.kv_heads)
        # Tokens of a tile share its KV; those after a token are masked by the kernel.
        for index in range(min(total, total - new + (i // cut.query_tile + 1) * cut.query_tile))
    }
    assert seen == expected


def check_slots(work: WorkList) -> None:
    """The parts of a unit are all there, in slots of their own, one after the other."""
    taken: list[int] = []
    units: dict[tuple[int, int], list[list[int]]] = {}
    for item in items_of(work):
        units.setdefault((item[1], item[4]), []).append(item)
    for items in units.values():
        assert [item[9] for item in items] == list(range(len(items)))
        assert {item[7] for item in items} == {len(items)}
        if len(items) > 1:
            assert len({item[8] for item in items}) == 1
            taken += [item[8] + item[9] for item in items]
    assert len(set(taken)) == len(taken)
    assert all(0 <= slot < work.slots for slot in taken)


@settings(max_examples=150, deadline=None)
@given(lens=LENS, query_tile=st.sampled_from([1, 4, 16]), programs=st.integers(1, 40), heads=st.integers(1, 3))
def test_balanced_programs_have_equal_shares_of_everything(
    lens: Lens, query_tile: int, programs: int, heads: int
) -> None:
    cut = Cut(query_tile=query_tile, kv_tile=8, kv_heads=heads, programs=programs)
    work = build(cut, lens)
    check_coverage(cut, lens, work)
    for each in work:
        check_slots(each)
        tiles = shares(cut, each)
        assert tiles.max() <= -(-tiles.sum() // programs)


@settings(max_examples=150, deadline=None)
@given(lens=LENS, query_tile=st.sampled_from([1, 4, 16]), programs=st.integers(1, 40), split=st.integers(1, 5))
def test_a_fixed_split_cuts_at_its_multiples_and_shares_to_within_one(
    lens: Lens, query_tile: int, programs: int, split: int
) -> None:
    cut = Cut(query_tile=query_tile, kv_tile=8, kv_heads=2, programs=programs, split=split)
    work = build(cut, lens)
    check_coverage(cut, lens, work)
    for each in work:
        check_slots(each)
        assert len(items_of(each)) == each.slots
        for item in items_of(each):
            assert item[5] == item[9] * split * cut.kv_tile
        tiles = shares(cut, each)
        assert tiles.max() < -(-tiles.sum() // programs) + split


def test_a_long_sequence_among_short_ones_occupies_every_program() -> None:
    """The case that dropping the split at larger batches gets wrong: one program would have 512 tiles of 519."""
    cut = Cut(query_tile=4, kv_tile=64, kv_heads=1, programs=132)
    (work,) = build(cut, [(1, 32768), *[(1, 40)] * 7])
    assert shares(cut, work).max() == 4


def test_a_fixed_split_takes_as_many_launches_as_its_working_memory_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_list, "MAX_ITEMS", 24)
    cut = Cut(query_tile=2, kv_tile=8, kv_heads=2, programs=4, split=1)
    lens = [(9, 30), (1, 20)]
    work = build(cut, lens)
    assert len(work) > 1
    longest = 2 * 4
    assert all(each.slots < 24 + longest for each in work)
    check_coverage(cut, lens, work)


def test_a_row_that_sees_nothing_is_still_written_once() -> None:
    cut = Cut(query_tile=4, kv_tile=8, kv_heads=1, programs=3)
    (work,) = build(cut, [(1, 0), (1, 9), (1, 0)])
    assert [(item[0], item[5], item[6]) for item in items_of(work) if item[6] == 0] == [(0, 0, 0), (2, 0, 0)]


def test_a_step_without_tokens_needs_no_launch() -> None:
    assert build(Cut(query_tile=4, kv_tile=8, kv_heads=1, programs=3), [(0, 5)]) == []
