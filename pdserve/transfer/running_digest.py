"""The digest of a region while its bytes arrive, or piece by piece from where it lies."""

import time

import numpy as np
import xxhash
from numpy.typing import NDArray


class RunningDigest:
    """xxh3-128 over the bytes so far. Used from one thread at a time."""

    def __init__(self, seed: int) -> None:
        """seed has 64 bits."""
        self._state = xxhash.xxh3_128(seed=seed)
        self.num_bytes = 0
        self.seconds = 0.0
        """Spent here."""

    def update(self, piece: NDArray[np.uint8]) -> None:
        """Append a contiguous piece."""
        begun = time.perf_counter()
        self._state.update(piece.data)
        self.num_bytes += piece.nbytes
        self.seconds += time.perf_counter() - begun

    def value(self) -> bytes:
        """16 bytes."""
        return bytes(self._state.digest())
