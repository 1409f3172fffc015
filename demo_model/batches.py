"""Gives the batch of any step without remembering the steps before it, so that training can resume anywhere."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from demo_model.encode import token_file
from demo_model.recipe import FINAL_WINDOWS_PER_BATCH, ROW, TRAINED_KINDS, WINDOW, WINDOWS_PER_BATCH


class Windows:
    """The shuffled windows of one kind."""

    def __init__(self, tokens: NDArray[np.uint16], kind: str, seed: int) -> None:
        """Take the tokens of a kind, packed rows for chat and one stream otherwise."""
        self._tokens = tokens
        self._seed = [seed, TRAINED_KINDS.index(kind)]
        # Chat rows must keep their beginnings; elsewhere every pass cuts at other places.
        self._packed = kind in ("chat", "core")
        self._stride = ROW if self._packed else WINDOW
        self.count = (len(tokens) - ROW - (0 if self._packed else WINDOW)) // self._stride + 1
        self._pass = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._shift = 0

    def row(self, index: int) -> NDArray[np.int64]:
        """Return the index-th row of an endless sequence of passes."""
        number, position = divmod(index, self.count)
        if number != self._pass:
            rng = np.random.default_rng([*self._seed, number])
            self._pass, self._order = number, rng.permutation(self.count)
            self._shift = 0 if self._packed else int(rng.integers(WINDOW))
        start = int(self._order[position]) * self._stride + self._shift
        return self._tokens[start : start + ROW].astype(np.int64)


class Batches:
    """Mixes the kinds in their fixed proportion."""

    def __init__(self, build: Path, seed: int) -> None:
        """Open the training tokens of every kind."""
        self.windows = {
            kind: Windows(np.load(token_file(build, kind, "train"), mmap_mode="r", allow_pickle=False), kind, seed)
            for kind in TRAINED_KINDS
        }

    def at(self, step: int, final: bool) -> torch.Tensor:
        """Return the rows of a step, one token longer than the window, in the mixture of its phase."""
        mixture = FINAL_WINDOWS_PER_BATCH if final else WINDOWS_PER_BATCH
        rows = [
            self.windows[kind].row(step * share + offset) for kind, share in mixture.items() for offset in range(share)
        ]
        return torch.from_numpy(np.stack(rows))
