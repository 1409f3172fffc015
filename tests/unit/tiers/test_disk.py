"""The disk tier's index: what a full disk lets in, what a restart finds, and whose folder it is."""

from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.tiers import disk as disk_module
from pdserve.tiers.disk import DiskTier
from tests.unit.tiers.blocks import LAYOUT, content, name, open_disk


def put(disk: DiskTier, number: int) -> None:
    reserved = disk.reserve(name(number), bytes(16))
    assert reserved
    disk.file.write(reserved[0], content(name(number)))
    disk.put(reserved[0])


def test_free_room_takes_everything_and_a_full_disk_what_is_asked_for_again(tmp_path: Path) -> None:
    disk = open_disk(tmp_path, slots=2)
    for number in range(2):
        assert disk.admits(name(number), used=False)
        put(disk, number)
    assert not disk.admits(name(2), used=False)
    assert disk.admits(name(3), used=True)
    assert disk.admits(name(2), used=False), "refused before, so it came twice"
    put(disk, 2)
    assert sorted(disk.hashes()) == sorted([name(1), name(2)])
    disk.close()


def test_pinned_blocks_stay(tmp_path: Path) -> None:
    disk = open_disk(tmp_path, slots=2)
    put(disk, 0)
    put(disk, 1)
    entries = [disk.get(name(number)) for number in range(2)]
    for entry in entries:
        assert entry
        entry.pins = 1
    assert disk.reserve(name(2), bytes(16)) is None
    assert entries[1]
    entries[1].pins = 0
    reserved = disk.reserve(name(2), bytes(16))
    assert reserved
    assert reserved[1] == name(1)
    disk.close()


def test_a_restart_finds_the_blocks_and_goes_on_where_it_was(tmp_path: Path) -> None:
    disk = open_disk(tmp_path, slots=3)
    for number in range(3):
        put(disk, number)
    disk.close()
    again = open_disk(tmp_path, slots=3)
    assert set(again.hashes()) == {name(0), name(1), name(2)}
    put(again, 3)
    assert set(again.hashes()) == {name(1), name(2), name(3)}, "the oldest left"
    again.close()
    assert set(open_disk(tmp_path, slots=3).hashes()) == {name(1), name(2), name(3)}


def test_a_folder_belongs_to_one_engine_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_LOCK_PATIENCE", 0.0)
    first = open_disk(tmp_path)
    other = open_disk(tmp_path, owner="another/engine")
    put(other, 1)
    with pytest.raises(ConfigError, match="used by another engine of the same name"):
        open_disk(tmp_path)
    first.close()
    second = open_disk(tmp_path)
    assert second.num_blocks == 0
    second.close()
    other.close()


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv\.tiers\.disk\.size: 100 bytes hold no block"):
        DiskTier.open(tmp_path, name="e", size=100, block_bytes=LAYOUT.block_bytes, identity=bytes(32))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"kv\.tiers\.disk\.path: cannot use .*file/e"):
        open_disk(tmp_path / "file")
