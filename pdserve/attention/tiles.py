"""How a step's queries are cut into attention calls: pure decisions, no tensors.

The result of attention rounds differently with the number of query rows and the padded KV length.
Deterministic tiles make both a function of a token's own KV index, whatever else is in the step: 16 rows aligned
to multiples of 16, and a KV length that follows from where the tile ends.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

QUERY_TILE = 16
KV_STEP = 512
"""KV lengths grow by doubling up to here, then by this much."""
MAX_GATHERED_TOKENS = 32768
"""Tokens of KV that tiles of different sequences may gather for one call; bounds the working memory."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries at KV indices [first, first + rows) of a sequence; some may not be in the step.

    They attend over kv_len indices, of which those past each query's own are masked.
    """

    sequence: int
    first: int
    rows: int
    kv_len: int


def kv_bucket(length: int) -> int:
    """The padded KV length for queries that end at length: 16, 32, …, 512, 1024, 1536, …"""
    if length > KV_STEP:
        return -(-length // KV_STEP) * KV_STEP
    return max(QUERY_TILE, 1 << (length - 1).bit_length())


def aligned_tiles(sequence: int, start: int, end: int) -> Iterator[Tile]:
    """Deterministic tiles that cover the new tokens [start, end) of a sequence."""
    for first in range(start // QUERY_TILE * QUERY_TILE, end, QUERY_TILE):
        yield Tile(sequence, first, QUERY_TILE, kv_bucket(first + QUERY_TILE))


def whole_tile(sequence: int, start: int, end: int) -> Iterator[Tile]:
    """One tile of exactly the new tokens [start, end): least work, but rounding depends on chunking."""
    yield Tile(sequence, start, end - start, kv_bucket(end))


def group_tiles(tiles: Sequence[Tile]) -> Iterator[list[Tile]]:
    """Split tiles into calls of equal shape: either all of one sequence, which then share its KV, or each of
    another sequence, within MAX_GATHERED_TOKENS."""
    shapes: dict[tuple[int, int], dict[int, list[Tile]]] = defaultdict(lambda: defaultdict(list))
    for tile in tiles:
        shapes[tile.rows, tile.kv_len][tile.sequence].append(tile)
    for (_, kv_len), by_sequence in shapes.items():
        singles = [group[0] for group in by_sequence.values() if len(group) == 1]
        yield from (group for group in by_sequence.values() if len(group) > 1)
        size = max(1, MAX_GATHERED_TOKENS // kv_len)
        yield from (singles[i : i + size] for i in range(0, len(singles), size))
