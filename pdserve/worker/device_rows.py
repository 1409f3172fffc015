"""The sequences that decode, as rows of a table on the device (pdserve_kernels.decode_rows says what a row holds).

Rows live as long as their sequences. A decode step makes its own inputs from them and leaves its tokens in them; the
host sends only what it alone knows, in one copy: who takes part if that changed, blocks added, settings of newcomers.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pdserve.core.batch import Row
from pdserve.worker.row_book import Changes, RowBook
from pdserve.worker.staging import Staging
from pdserve_kernels.decode_rows.columns import TABLE, TOKEN

PADDING = -1
"""In `order`: no row at all. Such a row writes no KV, and its results are dropped."""
_FIRST_ROWS = 512


class DeviceRows:
    """max_blocks: of one sequence; max_size: rows of the largest step whose inputs come from here."""

    def __init__(self, *, max_blocks: int, max_size: int, staging: Staging) -> None:
        width = TABLE + max_blocks
        self._staging = staging
        self._book = RowBook(_FIRST_ROWS, width)
        self.table = torch.zeros(_FIRST_ROWS, width, dtype=torch.int64, device=staging.device)
        self.order = torch.full((max_size,), PADDING, dtype=torch.int64, device=staging.device)
        """Which rows the next step takes, in the batch's order."""
        self._order: list[int] = [PADDING] * max_size

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        self._book.drop(sequence_ids)

    def make_room(self, rows: Sequence[Row]) -> bool:
        """Whether the table had to move for a step's newcomers: graphs that refer to it are void then."""
        missing = self._book.missing(rows)
        if missing <= 0:
            return False
        added = max(missing, self._book.capacity)
        self.table = torch.cat((self.table, self.table.new_zeros(added, self.table.shape[1])))
        self._book.grow(self._book.capacity + added)
        return True

    def decode(self, rows: Sequence[Row], size: int) -> Changes:
        """Make table and order ready for a step of these rows, padded to `size`."""
        changes = self._book.decode(rows)
        order = changes.order + [PADDING] * (size - len(rows))
        same = order == self._order[:size]
        if same and not changes.cells:
            return changes
        staged = self._staging.to_device(
            np.array([*changes.cells, *changes.values, *([] if same else order)], dtype=np.int64)
        )
        count = len(changes.cells)
        if count:
            self.table.view(-1).index_copy_(0, staged[:count], staged[count : 2 * count])
        if not same:
            self.order[:size].copy_(staged[2 * count :])
            self._order[:size] = order
        return changes

    def follow(self, rows: Sequence[Row]) -> None:
        """Take note of a step whose inputs come from the host."""
        self._book.follow(rows)

    def rows_of(self, rows: Sequence[Row]) -> list[int]:
        """Where these sequences' last tokens are, or will be. Raises ValueError for a sequence that has none."""
        return [self._book.row_of(row) for row in rows]

    def last_tokens(self, rows: Tensor) -> Tensor:
        """(rows,) on the device."""
        return self.table[rows, TOKEN]

    def clear_order(self) -> None:
        """The next step has padding only, until `decode` says otherwise."""
        self.order.fill_(PADDING)
        self._order = [PADDING] * len(self._order)
