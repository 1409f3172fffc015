"""Which tokens each sequence has had: the history of the repetition penalty."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pdserve.worker.staging import Staging


class SeenTokens:
    """One row of vocab flags per sequence, written when the sequence comes and extended token by token.

    Of another dtype, a flag is 1 and not 0, and who extends rows of the table in place decides what else it tells.
    """

    def __init__(self, vocab_size: int, device: torch.device, dtype: torch.dtype = torch.bool) -> None:
        self._staging = Staging(device)
        self._flags = torch.zeros(0, vocab_size, dtype=dtype, device=device)
        self._free: list[int] = []
        self._rows: dict[int, int] = {}

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._rows

    @property
    def table(self) -> Tensor:
        """(rows, vocab), in which row_of tells a sequence's row; another one after a sequence has come."""
        return self._flags

    def row_of(self, sequence_id: int) -> int:
        """The sequence's row of the table, -1 for one that is not here."""
        return self._rows.get(sequence_id, -1)

    def start(self, sequence_id: int, token_ids: Iterable[int]) -> None:
        """Begin (or begin anew) a sequence whose history is token_ids; nobody waits for the device."""
        if sequence_id not in self._rows:
            if not self._free:
                self._grow()
            self._rows[sequence_id] = self._free.pop()
        row = self._flags[self._rows[sequence_id]]
        row.zero_()
        row.index_fill_(0, self._staging.to_device(np.fromiter(token_ids, dtype=np.int64)), 1)

    def add(self, sequence_id: int, token_id: int) -> None:
        self._flags[self._rows[sequence_id], token_id] = True

    def drop(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        row = self._rows.pop(sequence_id, None)
        if row is not None:
            self._free.append(row)

    def of(self, sequence_ids: Sequence[int]) -> Tensor:
        """(sequences, vocab) bool."""
        return self._flags[[self._rows[sequence_id] for sequence_id in sequence_ids]]

    def _grow(self) -> None:
        rows = self._flags.shape[0]
        added = max(8, rows)
        self._flags = torch.cat((self._flags, self._flags.new_zeros(added, self._flags.shape[1])))
        self._free = list(range(rows, rows + added))
