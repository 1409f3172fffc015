"""Who reads what from whom between engines of different numbers of ranks."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import LayoutMismatch
from pdserve.core.shards import KVPart, KVShard, plan_parts

LAYERS = (0, 3)
SIZES = (1, 2, 3, 4, 6, 8)


def divided(num_heads: int, num_ranks: int) -> list[KVShard]:
    """Heads split evenly; with fewer heads than ranks, neighbouring ranks hold the same one."""
    size = max(1, num_heads // num_ranks)
    firsts = [rank * num_heads // num_ranks for rank in range(num_ranks)]
    return [KVShard(rank=r, layers=LAYERS, heads=(first, first + size)) for r, first in enumerate(firsts)]


def fits(num_heads: int, num_ranks: int) -> bool:
    return num_heads % num_ranks == 0 or num_ranks % num_heads == 0


engines = st.sampled_from(
    [(h, m, n) for h in (1, 2, 3, 4, 6, 8) for m in SIZES for n in SIZES if fits(h, m) and fits(h, n)]
).map(lambda shape: (divided(shape[0], shape[1]), divided(shape[0], shape[2])))


@st.composite
def uneven(draw: st.DrawFn) -> tuple[list[KVShard], list[KVShard]]:
    """Any ranges of heads, as long as the source's ranks hold all that the target's want."""
    total = draw(st.integers(1, 8))
    ranges = st.tuples(st.integers(0, total - 1), st.integers(1, total)).filter(lambda r: r[0] < r[1])
    wanted = draw(st.lists(ranges, min_size=1, max_size=4))
    held = [*draw(st.lists(ranges, max_size=4)), (0, total)]
    sides = [[KVShard(rank=i, layers=LAYERS, heads=r) for i, r in enumerate(side)] for side in (held, wanted)]
    return sides[0], sides[1]


def heads_by_reader(parts: Sequence[KVPart]) -> Counter[tuple[int, int]]:
    return Counter((part.target_rank, head) for part in parts for head in range(*part.heads))


@given(st.one_of(engines, uneven()))
def test_every_rank_gets_each_of_its_heads_once_from_a_rank_that_holds_it(
    sides: tuple[list[KVShard], list[KVShard]],
) -> None:
    source, target = sides
    parts = plan_parts(source, target)
    assert heads_by_reader(parts) == Counter((shard.rank, head) for shard in target for head in range(*shard.heads))
    held = {shard.rank: shard.heads for shard in source}
    for part in parts:
        first, end = held[part.source_rank]
        assert first <= part.heads[0] < part.heads[1] <= end


@given(engines)
def test_ranks_that_hold_the_same_heads_share_the_work(sides: tuple[list[KVShard], list[KVShard]]) -> None:
    source, target = sides
    asked: Counter[int] = Counter()
    for part in plan_parts(source, target):
        asked[part.source_rank] += part.heads[1] - part.heads[0]
    for heads in {shard.heads for shard in source}:
        loads = [asked[shard.rank] for shard in source if shard.heads == heads]
        assert max(loads) - min(loads) <= heads[1] - heads[0]


@given(engines)
def test_both_sides_of_a_pair_of_engines_come_to_the_same_plan(sides: tuple[list[KVShard], list[KVShard]]) -> None:
    source, target = sides
    assert plan_parts(source, target) == plan_parts(source[::-1], target[::-1])


@pytest.mark.parametrize(
    ("heads", "source", "target", "expected"),
    [
        (2, 1, 1, [(0, 0, (0, 2))]),
        (2, 1, 2, [(0, 0, (0, 1)), (0, 1, (1, 2))]),
        (2, 2, 1, [(0, 0, (0, 1)), (1, 0, (1, 2))]),
        (4, 4, 2, [(0, 0, (0, 1)), (1, 0, (1, 2)), (2, 1, (2, 3)), (3, 1, (3, 4))]),
        (1, 2, 2, [(0, 0, (0, 1)), (1, 1, (0, 1))]),
        (1, 2, 1, [(0, 0, (0, 1))]),
        (1, 1, 2, [(0, 0, (0, 1)), (0, 1, (0, 1))]),
        (6, 3, 2, [(0, 0, (0, 2)), (1, 0, (2, 3)), (1, 1, (3, 4)), (2, 1, (4, 6))]),
    ],
)
def test_plans_of_common_shapes(
    heads: int, source: int, target: int, expected: list[tuple[int, int, tuple[int, int]]]
) -> None:
    parts = plan_parts(divided(heads, source), divided(heads, target))
    assert [(part.source_rank, part.target_rank, part.heads) for part in parts] == expected


def test_what_the_source_lacks_is_named() -> None:
    with pytest.raises(LayoutMismatch, match="no rank of the source holds key-value heads 1 to 1"):
        plan_parts(divided(2, 2)[:1], divided(2, 1))
    other = [KVShard(rank=0, layers=(0, 2), heads=(0, 2))]
    with pytest.raises(LayoutMismatch, match="different layers"):
        plan_parts(divided(2, 1), other)
