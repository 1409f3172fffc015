"""The file below the disk tier: it finds its blocks again, and never takes another's or a torn one for one of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.tiers.checksum import Checksum
from pdserve.tiers.slot_file import Label, SlotFile, slots_within
from tests.unit.tiers.blocks import IDENTITY, name

BLOCK = 6000
"""Not a multiple of the alignment."""
SLOTS = 4


def block(number: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.random.default_rng(number).integers(0, 256, BLOCK, dtype=np.uint8)


def open_file(path: Path, *, identity: bytes = IDENTITY, slots: int = SLOTS) -> SlotFile:
    return SlotFile.open(path, block_bytes=BLOCK, num_slots=slots, identity=identity)


def write(file: SlotFile, slot: int, number: int, stamp: int) -> None:
    checksum = Checksum(IDENTITY)(name(number), block(number))
    file.write(Label(slot, stamp, name(number), checksum), block(number))


def read(file: SlotFile, slot: int) -> bytes:
    target = np.empty(BLOCK, dtype=np.uint8)
    file.read(slot, [target])
    return target.tobytes()


def test_blocks_are_found_again_in_the_order_they_were_written(tmp_path: Path) -> None:
    file = open_file(tmp_path / "f")
    for slot, number in enumerate((7, 8, 9)):
        write(file, slot, number, stamp=10 - slot)
    file.close()
    again = open_file(tmp_path / "f")
    labels, damaged = again.labels()
    assert [label.block_hash for label in labels] == [name(9), name(8), name(7)]
    assert damaged == 0
    assert [read(again, label.slot) for label in labels] == [block(n).tobytes() for n in (9, 8, 7)]
    again.close()


def test_adjacent_slots_are_read_at_once_into_pieces(tmp_path: Path) -> None:
    file = open_file(tmp_path / "f")
    for slot in range(3):
        write(file, slot, slot, stamp=slot + 1)
    first, second = np.empty((2, BLOCK), dtype=np.uint8)
    file.read(1, [first.reshape(4, -1), second])
    assert (first == block(1)).all()
    assert (second == block(2)).all()
    file.close()


@pytest.mark.parametrize("changed", [{"identity": bytes(32)}, {"slots": SLOTS + 1}])
def test_a_file_of_another_kind_is_replaced_by_an_empty_one(tmp_path: Path, changed: dict[str, object]) -> None:
    file = open_file(tmp_path / "f")
    write(file, 0, 1, stamp=1)
    file.close()
    other = open_file(tmp_path / "f", **changed)  # type: ignore[arg-type]
    assert other.labels() == ([], 0)
    other.close()


def test_it_takes_all_its_room_at_once_and_no_more_than_told(tmp_path: Path) -> None:
    size = 100_000
    slots = slots_within(size, BLOCK)
    assert slots > 1
    open_file(tmp_path / "f", slots=slots).close()
    stat = (tmp_path / "f").stat()
    assert stat.st_size <= size < stat.st_size + 2 * 8192
    assert stat.st_blocks * 512 >= stat.st_size
    assert stat.st_mode & 0o077 == 0


def test_no_room_is_an_error_that_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no room for .* MiB"):
        open_file(tmp_path / "f", slots=2**40)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 64 * SLOTS - 1), bit=st.integers(0, 7))
def test_a_damaged_label_is_no_label(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("slots") / "f"
    file = open_file(path)
    for slot in range(SLOTS):
        write(file, slot, slot, stamp=slot + 1)
    file.close()
    with path.open("r+b") as raw:
        raw.seek(4096 + at)
        (byte,) = raw.read(1)
        raw.seek(4096 + at)
        raw.write(bytes([byte ^ 1 << bit]))
    again = open_file(path)
    labels, damaged = again.labels()
    assert [label.slot for label in labels] == [slot for slot in range(SLOTS) if slot != at // 64]
    assert damaged == 1
    again.close()


WRITER = """
import sys
from pathlib import Path
from tests.unit.tiers.test_slot_file import open_file, write
file = open_file(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    write(file, number % 4, number, number + 1)
    number += 1
"""


@pytest.mark.parametrize("delay", [0.001, 0.02])
def test_a_process_killed_while_it_writes_leaves_only_whole_blocks(tmp_path: Path, delay: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "f")], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        try:
            writer.wait(delay)
        except subprocess.TimeoutExpired:
            os.kill(writer.pid, signal.SIGKILL)
    file = open_file(tmp_path / "f")
    labels, damaged = file.labels()
    assert damaged == 0
    assert len(labels) >= min(labels[-1].stamp, SLOTS) - 1 if labels else True
    for label in labels:
        number = label.stamp - 1
        assert label.block_hash == name(number)
        assert read(file, label.slot) == block(number).tobytes()
    file.close()
