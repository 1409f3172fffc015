"""Which row of the device's table each sequence has, and what a step must change there. Decisions only: no tensors.

A sequence has a row from its first sampled token until its sampler state is released. While it decodes, the host tells
the device nothing about it but the blocks it grows by: position and last token follow by themselves.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pdserve.core.batch import Row, SamplerInit, TokenSource
from pdserve.worker.row_settings import sampled_position
from pdserve_kernels.decode_rows.columns import POSITION, STREAM, TABLE, TOKEN
from pdserve_kernels.sampling.reference import noise_stream

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Changes:
    """order: the device row of each of the batch's rows. values[i] belongs into cell cells[i] of the table, counted row
    by row; no cell occurs twice. plain: whether what the table tells is all there is to sampling, for every row."""

    order: list[int]
    cells: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    plain: bool = True

    def set(self, first: int, *values: int) -> None:
        """Cells from first on."""
        self.cells.extend(range(first, first + len(values)))
        self.values.extend(values)


@dataclass(slots=True)
class _Place:
    """row: the sequence's row. position and blocks: what the device has there (blocks: how many of the table's).
    expected: where the sequence goes on, if nothing happened to it; anything else makes its table unknown.
    unsent: settings the device lacks. plain_from: the sampled position from which they have no more to say than fits
    the table."""

    row: int
    position: int = -1
    blocks: int = 0
    expected: int = -1
    unsent: SamplerInit | None = None
    plain_from: int = 0


class RowBook:
    """The host's account of a table of `capacity` rows with `width` columns."""

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity = capacity
        self.width = width
        self._places: dict[int, _Place] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def grow(self, capacity: int) -> None:
        """Rows keep what they have."""
        self._free = [*range(capacity - 1, self.capacity - 1, -1), *self._free]
        self.capacity = capacity

    def missing(self, rows: Sequence[Row]) -> int:
        """How many rows more a step needs than are free."""
        return sum(row.sample and row.sequence_id not in self._places for row in rows) - len(self._free)

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        for sequence_id in sequence_ids:
            if place := self._places.pop(sequence_id, None):
                self._free.append(place.row)

    def row_of(self, row: Row) -> int:
        """Where a sequence's last token is. Raises ValueError for one that has none."""
        if row.sequence_id not in self._places:
            raise ValueError(f"sequence {row.sequence_id}: the step before sampled nothing for it")
        return self._places[row.sequence_id].row

    def follow(self, rows: Sequence[Row]) -> None:
        """Take note of a step whose inputs come from the host: the device's positions and tables stay as they are."""
        for row in rows:
            if row.sample:
                self._place(row)

    def decode(self, rows: Sequence[Row]) -> Changes:
        """What the device lacks for a step of one new token per row, all sampled, after which it counts on by
        itself."""
        changes, plain = Changes([]), True
        for row in rows:
            if row.token_source is TokenSource.PREVIOUS_STEP:
                self.row_of(row)
            place = self._place(row)
            first = place.row * self.width
            changes.order.append(place.row)
            if place.position != row.start:
                changes.set(first + POSITION, row.start)
            if row.token_source is TokenSource.KNOWN:
                changes.set(first + TOKEN, row.token_ids[0])
            if place.unsent is not None:
                changes.set(first + STREAM, *_settings(place.unsent))
                place.unsent = None
            if len(row.block_ids) > place.blocks:
                changes.set(first + TABLE + place.blocks, *row.block_ids[place.blocks :])
                place.blocks = len(row.block_ids)
            place.position = row.start + 1
            plain = plain and sampled_position(row) >= place.plain_from
        return replace(changes, plain=plain)

    def _place(self, row: Row) -> _Place:
        """The sequence's place, its table unknown unless blocks can only have been added since."""
        place = self._places.get(row.sequence_id)
        if place is None:
            place = self._places[row.sequence_id] = _Place(self._free.pop())
        count = len(row.block_ids)
        if TABLE + count > self.width:
            raise ValueError(f"sequence {row.sequence_id} has {count} blocks; the model's length allows {self.width}")
        if row.sampler is not None:
            place.unsent, place.plain_from = row.sampler, _plain_from(row.sampler)
        if row.sampler is not None or row.num_tokens != 1 or row.start != place.expected or count < place.blocks:
            place.blocks = 0
        place.expected = row.start + row.num_tokens
        return place


def _settings(init: SamplerInit) -> tuple[int, ...]:
    """The cells from STREAM to MIN_P."""
    numbers = struct.unpack("<3i", struct.pack("<3f", init.temperature, init.top_p, init.min_p))
    return (noise_stream(init.seed, init.sample_index), init.top_k, *numbers)


def _plain_from(init: SamplerInit) -> int:
    """The first position whose token neither a penalty nor the ban on ending early bears on."""
    if init.repetition_penalty != 1:
        return _NEVER
    return init.prompt_len + init.min_tokens if init.banned_token_ids else 0
