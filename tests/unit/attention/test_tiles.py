"""Cutting queries into calls: every token once, and deterministic shapes that depend on its index alone."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.attention.tiles import (
    MAX_GATHERED_TOKENS,
    QUERY_TILE,
    Tile,
    aligned_tiles,
    group_tiles,
    kv_bucket,
    whole_tile,
)

spans = st.tuples(st.integers(0, 3000), st.integers(1, 600)).map(lambda s: (s[0], s[0] + s[1]))
indices = st.integers(0, 5000)


@given(spans)
def test_aligned_tiles_cover_exactly_the_tiles_the_new_tokens_touch(span: tuple[int, int]) -> None:
    start, end = span
    tiles = list(aligned_tiles(7, start, end))
    covered = [index for tile in tiles for index in range(tile.first, tile.first + tile.rows)]
    assert covered == list(range(start // QUERY_TILE * QUERY_TILE, -(-end // QUERY_TILE) * QUERY_TILE))
    assert {tile.sequence for tile in tiles} == {7}


@given(indices, st.integers(0, 40), st.integers(1, 40))
def test_the_tile_of_an_index_does_not_depend_on_the_step(index: int, before: int, after: int) -> None:
    alone = next(aligned_tiles(0, index, index + 1))
    around = aligned_tiles(0, max(0, index - before), index + after)
    assert alone in set(around)


@given(spans)
def test_a_whole_tile_is_the_span(span: tuple[int, int]) -> None:
    (tile,) = whole_tile(0, *span)
    assert (tile.first, tile.first + tile.rows) == span
    assert tile.kv_len >= span[1]


@given(indices)
def test_a_bucket_holds_the_length_and_grows_with_it(index: int) -> None:
    length = index + 1
    assert length <= kv_bucket(length) <= max(QUERY_TILE, 2 * length, length + 511)
    assert kv_bucket(length) <= kv_bucket(length + 1)


def test_buckets_double_to_512_then_grow_by_512() -> None:
    found = sorted({kv_bucket(length) for length in range(1, 2049)})
    assert found == [16, 32, 64, 128, 256, 512, 1024, 1536, 2048]


@given(st.lists(spans, max_size=12))
def test_groups_hold_every_tile_once_in_one_shape(sequences: list[tuple[int, int]]) -> None:
    tiles = [tile for s, span in enumerate(sequences) for tile in aligned_tiles(s, *span)]
    groups = list(group_tiles(tiles))
    assert sorted(str(tile) for group in groups for tile in group) == sorted(map(str, tiles))
    for group in groups:
        assert len({(tile.rows, tile.kv_len) for tile in group}) == 1
        assert len({tile.sequence for tile in group}) in (1, len(group))


def test_sequences_are_batched_only_as_far_as_memory_allows() -> None:
    tiles = [Tile(s, 0, 16, 1024) for s in range(100)]
    sizes = [len(group) for group in group_tiles(tiles)]
    assert sizes == [32, 32, 32, 4]
    assert all(size * 1024 <= MAX_GATHERED_TOKENS for size in sizes)
    assert [len(group) for group in group_tiles([Tile(s, 0, 16, 10**6) for s in range(2)])] == [1, 1]
