"""A block in a tier."""

from dataclasses import dataclass

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import Tier


@dataclass(slots=True, eq=False)
class Entry:
    """pins counts those that read or write its slot just now; it is not given away meanwhile.

    used: whether it was asked for again since it came. left: taken out of its tier while it was pinned, so that its
    slot is given back with the last pin. wrong: its KV was computed wrong, so it is not to be kept anywhere."""

    block_hash: BlockHash
    tier: Tier
    slot: int
    checksum: bytes
    used: bool = False
    pins: int = 0
    left: bool = False
    wrong: bool = False
