"""Which of an engine's ranks holds which key-value heads, and who reads what from whom.

A prefill engine of m ranks and a decode engine of n ranks hold the same KV, cut differently: heads split among ranks,
or, with fewer heads than ranks, several ranks with the same head. `plan_parts` says what each rank of the reader takes
from which rank of the source.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pdserve.core.errors import LayoutMismatch
from pdserve.core.layout import KVLayout

Range = tuple[int, int]
"""Half-open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShard:
    """What one rank of an engine holds of the KV of every block."""

    rank: int
    layers: Range
    heads: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPart:
    """Heads of a block, in all layers, that one rank of a reader takes from one rank of the source."""

    source_rank: int
    target_rank: int
    heads: Range


def sole_shard(layout: KVLayout) -> KVShard:
    """That of an engine with one rank."""
    return KVShard(rank=0, layers=(0, layout.group.num_layers), heads=(0, layout.group.num_kv_heads))


def plan_parts(source: Sequence[KVShard], target: Sequence[KVShard]) -> tuple[KVPart, ...]:
    """Parts that together give every target rank each of its heads exactly once, by target rank and head.

    Of source ranks that hold the same head, the one asked for the fewest heads so far is taken, so that replicas share
    the work. Raises LayoutMismatch when the source lacks something.
    """
    _check_layers(source, target)
    asked: Counter[int] = Counter()
    parts: list[KVPart] = []
    for reader in sorted(target, key=lambda shard: shard.rank):
        for piece in _pieces(reader.heads, source):
            holders = [shard.rank for shard in source if shard.heads[0] <= piece[0] and piece[1] <= shard.heads[1]]
            if not holders:
                raise LayoutMismatch(f"no rank of the source holds key-value heads {piece[0]} to {piece[1] - 1}")
            chosen = min(holders, key=lambda rank: (asked[rank], rank))
            asked[chosen] += piece[1] - piece[0]
            _append(parts, KVPart(source_rank=chosen, target_rank=reader.rank, heads=piece))
    return tuple(parts)


def _check_layers(source: Sequence[KVShard], target: Sequence[KVShard]) -> None:
    if len({shard.layers for shard in (*source, *target)}) > 1:
        raise LayoutMismatch("the ranks of the two engines hold different layers; only heads may be divided")


def _pieces(heads: Range, source: Iterable[KVShard]) -> list[Range]:
    """heads, cut wherever a source rank's begin or end."""
    cuts = {cut for shard in source for cut in shard.heads if heads[0] < cut < heads[1]}
    ends = sorted({*heads, *cuts})
    return list(pairwise(ends))


def _append(parts: list[KVPart], part: KVPart) -> None:
    """Add a part, as one with the last when it goes on from there."""
    last = parts[-1] if parts else None
    if last is None or replace(last, heads=part.heads) != part or last.heads[1] != part.heads[0]:
        parts.append(part)
    else:
        parts[-1] = replace(part, heads=(last.heads[0], part.heads[1]))
