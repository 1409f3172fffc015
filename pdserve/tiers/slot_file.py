"""One file of equal slots that survives its process: a header, a table of labels, the blocks.

    0          magic, version, block_bytes, num_slots, identity, check
    4096       num_slots labels of 64 bytes: stamp, block hash, checksum, check
    aligned    num_slots blocks, each aligned to 4096 bytes

The file has its full size from the start, so it neither grows nor runs out of room. A slot's label is blanked
before its block is overwritten and written after it, so a process killed in between leaves a blank slot. A
machine that loses power may keep any of those writes without the others; then a label's own check, or the block's
checksum when it is read, does not fit. So nothing else than an erasure, of a block whose checksum fits but whose
content is wrong, is ever synced: a cache need not last, it need only be right.
"""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pdserve.core.blocks import HASH_BYTES, BlockHash
from pdserve.core.errors import ConfigError
from pdserve.tiers.arena import Bytes
from pdserve.tiers.checksum import CHECKSUM_BYTES

ALIGNMENT = 4096
IDENTITY_BYTES = 32
_MAGIC = b"pdserve-kv-tier2"
_HEADER = struct.Struct(f"<16sQQ{IDENTITY_BYTES}sQ")
_LABEL = struct.Struct(f"<QQ{HASH_BYTES}s{CHECKSUM_BYTES}s8xQ")
"""Stamp (never 0), slot, block hash, checksum, check."""
_MAX_VECTORS = 512


@dataclass(frozen=True, slots=True)
class Label:
    """What a slot holds. stamp grows with every label written to the file."""

    slot: int
    stamp: int
    block_hash: BlockHash
    checksum: bytes


class SlotFile:
    """Calls on different slots may come from different threads at once. Raises OSError when the disk does."""

    def __init__(self, path: Path, fd: int, block_bytes: int, num_slots: int) -> None:
        self.block_bytes = block_bytes
        self.num_slots = num_slots
        self._path = path
        self._fd = fd
        self._stride = _aligned(block_bytes)
        self._blocks_at = _blocks_at(num_slots)
        self._padding = np.zeros(self._stride - block_bytes, dtype=np.uint8)

    @classmethod
    def open(cls, path: Path, *, block_bytes: int, num_slots: int, identity: bytes) -> "SlotFile":
        """The file at path if it is one of exactly this kind, otherwise a new one in its place.

        identity (32 bytes) names whose blocks they are. Raises ConfigError when there is no room for it."""
        header = _header(block_bytes, num_slots, identity)
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(fd, _HEADER.size, 0) == header and os.fstat(fd).st_size == _size(block_bytes, num_slots):
                return cls(path, fd, block_bytes, num_slots)
            os.close(fd)
            path.unlink()
        return cls(path, _create(path, header, _size(block_bytes, num_slots)), block_bytes, num_slots)

    def labels(self) -> tuple[list[Label], int]:
        """(valid labels by stamp, number of damaged ones)."""
        table = os.pread(self._fd, self.num_slots * _LABEL.size, ALIGNMENT)
        labels, damaged = [], 0
        for slot, (stamp, named, block_hash, checksum, check) in enumerate(_LABEL.iter_unpack(table)):
            if not stamp and not check:
                continue
            if named == slot and check == _check(table[slot * _LABEL.size : (slot + 1) * _LABEL.size]):
                labels.append(Label(slot, stamp, block_hash, checksum))
            else:
                damaged += 1
        return sorted(labels, key=lambda label: label.stamp), damaged

    def write(self, label: Label, block: Bytes) -> None:
        """Replace what the label's slot holds."""
        self.blank(label.slot)
        self._write(block.data, self._offset(label.slot))
        fields = (label.stamp, label.slot, label.block_hash, label.checksum)
        check = _check(_LABEL.pack(*fields, 0))
        self._write(memoryview(_LABEL.pack(*fields, check)), ALIGNMENT + label.slot * _LABEL.size)

    def blank(self, slot: int) -> None:
        self._write(memoryview(bytes(_LABEL.size)), ALIGNMENT + slot * _LABEL.size)

    def erase(self, slots: Sequence[int]) -> None:
        """Blank slots whose blocks nobody may find again, also after a loss of power. Where that cannot be written, the
        file loses its name: the next process starts with an empty one."""
        try:
            for slot in slots:
                self.blank(slot)
            os.fdatasync(self._fd)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def read(self, slot: int, targets: Sequence[Bytes]) -> None:
        """Read the blocks of slots slot, slot + 1, … each into its target, flat or in pieces, with as few calls as
        possible."""
        vectors: list[memoryview] = []
        for target in targets:
            vectors += [target.data] if target.ndim == 1 else [piece.data for piece in target]
            if self._padding.nbytes:
                vectors.append(self._padding.data)
        at = self._offset(slot)
        for first in range(0, len(vectors), _MAX_VECTORS):
            at += _read_fully(self._fd, vectors[first : first + _MAX_VECTORS], at)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _offset(self, slot: int) -> int:
        return self._blocks_at + slot * self._stride

    def _write(self, data: memoryview, offset: int) -> None:
        while data.nbytes:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written


def slots_within(size: int, block_bytes: int) -> int:
    """How many blocks fit into a file of at most size bytes."""
    slots = max(0, (size - ALIGNMENT) // (_aligned(block_bytes) + _LABEL.size))
    while slots and _size(block_bytes, slots) > size:
        slots -= 1
    return slots


def _read_fully(fd: int, vectors: list[memoryview], at: int) -> int:
    """How many bytes they take."""
    begun = at
    while vectors:
        count = os.preadv(fd, vectors, at)
        if count == 0:
            raise OSError("the file of the disk tier is shorter than it was")
        at += count
        while vectors and count >= vectors[0].nbytes:
            count -= vectors.pop(0).nbytes
        if count:
            vectors[0] = vectors[0][count:]
    return at - begun


def _create(path: Path, header: bytes, size: int) -> int:
    """Under another name until it is whole, and readable for this user only: it holds what prompts were made into."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, header, 0)
        os.rename(draft, path)
    except OSError as error:
        os.close(fd)
        draft.unlink(missing_ok=True)
        raise ConfigError(
            f"kv.tiers.disk: {path.parent} has no room for {size / 2**20:.0f} MiB ({error.strerror}); "
            "lower kv.tiers.disk.size or choose another path"
        ) from error
    return fd


def _header(block_bytes: int, num_slots: int, identity: bytes) -> bytes:
    fields = (_MAGIC, block_bytes, num_slots, identity)
    return _HEADER.pack(*fields, xxhash.xxh3_64_intdigest(_HEADER.pack(*fields, 0)))


def _check(label: bytes) -> int:
    """Over everything before the check; never 0, which is a blank slot's."""
    return xxhash.xxh3_64_intdigest(label[:-8]) or 1


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _blocks_at(num_slots: int) -> int:
    return ALIGNMENT + _aligned(num_slots * _LABEL.size)


def _size(block_bytes: int, num_slots: int) -> int:
    return _blocks_at(num_slots) + num_slots * _aligned(block_bytes)
