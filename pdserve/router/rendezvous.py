"""A stable choice between equals: by what is asked, not by chance or by what is left of earlier load.

Of several engines the one whose turn has the least number takes what is called by a name. Every gateway and the
simulator choose alike; when an engine leaves, only what it had moves (highest random weight hashing, Thaler and
Ravishankar 1998). A turn mixes the 64 bits of a name with those of an engine as SplitMix64 does (Steele, Lea and Flood
2014).
"""

from functools import lru_cache

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_BITS = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def name_bits(name: bytes) -> int:
    return int.from_bytes(blake3(name).digest(8), "little")


@lru_cache(maxsize=1 << 14)
def engine_bits(engine_id: str) -> int:
    return name_bits(engine_id.encode())


def turn(name: int, engine_id: str) -> int:
    """name: its name_bits."""
    mixed = name ^ engine_bits(engine_id)
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _BITS
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _BITS
    return mixed ^ (mixed >> 31)


def turns(name: int, engines: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`turn` of many engines, given their engine_bits."""
    mixed = engines ^ np.uint64(name)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND)
    return mixed ^ (mixed >> np.uint64(31))
