"""The store: whatever is saved, evicted, spilled, damaged and restored, a restored block is the block of that name."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.core.layout import KVOrder
from pdserve.core.tiers import Tier, TierTally
from pdserve.tiers.arena import Bytes
from pdserve.tiers.disk import DiskTier
from pdserve.tiers.restore import Restorer
from pdserve.tiers.slot_file import SlotFile
from pdserve.tiers.store import TierStore
from tests.unit.tiers.blocks import LAYOUT, Device, layout_of, make_store, name, open_disk


@contextmanager
def opened(
    path: Path | None, *, host_slots: int, disk_slots: int = 4, device: Device | None = None
) -> Iterator[tuple[Device, TierStore, Restorer]]:
    device = device or Device()
    store = make_store(device, host_slots=host_slots, disk=open_disk(path, disk_slots) if path else None)
    yield device, store, Restorer(store, device.blocks)
    store.close(5)
    device.close()


def save(device: Device, store: TierStore, *numbers: int) -> None:
    """As one chain, out of blocks 0, 1, …"""
    for block, number in enumerate(numbers):
        device.fill(block, name(number))
    store.save([(name(number), block) for block, number in enumerate(numbers)], ())


def restore(device: Device, restorer: Restorer, *numbers: int) -> int:
    """Into the last blocks; how many came back, all of them right."""
    targets = range(LAYOUT.num_blocks - len(numbers), LAYOUT.num_blocks)
    count, _ = restorer.restore([name(number) for number in numbers], list(targets))
    for block, number in list(zip(targets, numbers, strict=True))[:count]:
        assert device.holds(block, name(number))
    return count


def tally(store: TierStore, tier: Tier) -> TierTally:
    return next(tally for tally in store.news().tallies if tally.tier is tier)


def settle(store: TierStore) -> None:
    """Wait until nothing is on its way to disk."""
    done = threading.Event()
    for _ in range(5000):
        if not store._spilling:
            return
        done.wait(0.001)
    raise AssertionError("spilling did not end")


def test_a_block_that_cannot_be_read_costs_the_host_tier_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(block: int, into: Bytes) -> None:
        raise RuntimeError("the copy failed")

    with opened(None, host_slots=2) as (device, store, restorer):
        with monkeypatch.context() as broken:
            broken.setattr(device.blocks, "read", fail)
            for number in (1, 2, 3):
                with pytest.raises(RuntimeError):
                    save(device, store, number)
        save(device, store, 4, 5)
        assert restore(device, restorer, 4, 5) == 2
        assert tally(store, Tier.HOST).refused == 0


def test_a_chain_comes_back_up_to_the_first_block_that_is_not_there() -> None:
    with opened(None, host_slots=4) as (device, store, restorer):
        save(device, store, 1, 2, 3)
        assert restore(device, restorer, 1, 2, 3) == 3
        assert restore(device, restorer, 1, 9, 3) == 1
        assert restore(device, restorer, 9, 1) == 0
        assert dict(store.news().changes)[name(9)] is None


@pytest.mark.parametrize(("order", "tensor"), [(order, tensor) for order in KVOrder for tensor in (False, True)])
def test_every_memory_is_served_from_both_tiers(tmp_path: Path, order: KVOrder, tensor: bool) -> None:
    """Also memory that is reached by copies only, as a GPU's: damaged bytes never get there."""
    device = Device(layout_of(order), tensor=tensor)
    with opened(tmp_path, host_slots=2, disk_slots=8, device=device) as (_, store, restorer):
        for number in range(4):
            save(device, store, number)
            settle(store)
        assert set(dict(store.contents().changes).values()) == set(Tier)
        assert restore(device, restorer, 0, 1, 2, 3) == 4
        target = LAYOUT.num_blocks - 1
        device.fill(target, name(99))
        (source,) = store.pin([name(3)])
        assert source.tier is Tier.HOST
        store.host_rows[source.slot][0] ^= 1
        store.release([source])
        assert restore(device, restorer, 3) == 0
        assert device.holds(target, name(99)) or not tensor


def test_no_flipped_bit_passes() -> None:
    rng = Random(1)
    with opened(None, host_slots=4) as (device, store, restorer):
        for _ in range(500):
            save(device, store, 1, 2)
            victim = rng.choice([1, 2])
            (source,) = store.pin([name(victim)])
            store.host_rows[source.slot][rng.randrange(LAYOUT.block_bytes)] ^= 1 << rng.randrange(8)
            store.release([source])
            assert restore(device, restorer, 1, 2) == victim - 1
        assert tally(store, Tier.HOST).corrupt == 500


def test_what_leaves_the_host_tier_is_found_on_disk_and_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        for number in range(6):
            save(device, store, number)
            settle(store)
        where = dict(store.contents().changes)
        assert set(where) == {name(number) for number in range(6)}
        assert restore(device, restorer, 0, 1, 2, 3, 4, 5) == 6
        assert tally(store, Tier.DISK).restored_blocks >= 4
    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        held = set(dict(store.contents().changes))
        assert held == {block_hash for block_hash, tier in where.items() if tier is Tier.DISK}
        assert restore(device, restorer, 0, 1, 2, 3) == 4


def test_a_block_that_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, _):
        for _ in range(3):
            for number in range(4):
                save(device, store, number)
                settle(store)
        assert tally(store, Tier.DISK).saved_bytes == 4 * LAYOUT.block_bytes


@pytest.mark.parametrize("tier", Tier)
def test_a_damaged_block_is_dropped_counted_and_not_used(tmp_path: Path, tier: Tier) -> None:
    with opened(tmp_path, host_slots=4, disk_slots=8) as (device, store, restorer):
        save(device, store, *range(7))
        settle(store)
        where = dict(store.contents().changes)
        victim = next(number for number in range(7) if where[name(number)] is tier)
        (source,) = store.pin([name(victim)])
        store.release([source])
        if tier is Tier.HOST:
            store.host_rows[source.slot][5] ^= 1
        else:
            file = tmp_path / "e" / "blocks"
            raw = bytearray(file.read_bytes())
            raw[-4096 * (8 - source.slot) + 5] ^= 1
            file.write_bytes(raw)
        assert restore(device, restorer, victim) == 0
        assert tally(store, tier).corrupt == 1
        assert dict(store.contents().changes).get(name(victim)) is None
        save(device, store, victim)
        assert restore(device, restorer, victim) == 1


def test_a_block_under_anothers_name_does_not_verify() -> None:
    with opened(None, host_slots=4) as (device, store, restorer):
        save(device, store, 1, 2)
        first, second = store.pin([name(1), name(2)])
        one, two = store.host_rows[first.slot].copy(), store.host_rows[second.slot].copy()
        store.host_rows[first.slot][...], store.host_rows[second.slot][...] = two, one
        store.release([first, second])
        assert restore(device, restorer, 1, 2) == 0


def test_an_unreadable_disk_costs_only_the_blocks_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        save(device, store, 0, 1, 2)
        settle(store)
        with monkeypatch.context() as patch:
            patch.setattr(SlotFile, "read", broken)
            assert restore(device, restorer, 2) == 0
        assert tally(store, Tier.DISK).failed == 1
        with monkeypatch.context() as patch:
            patch.setattr(SlotFile, "write", broken)
            save(device, store, 3, 4, 5)
            settle(store)
        assert tally(store, Tier.DISK).failed > 1
        save(device, store, 6)
        assert restore(device, restorer, 6) == 1


@pytest.mark.parametrize("method", ["write", "reserve", "put"])
def test_an_error_nobody_has_foreseen_costs_the_disk_tier_only_the_block_it_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a defect")

    owner = SlotFile if method == "write" else DiskTier
    with opened(tmp_path, host_slots=2, disk_slots=16) as (device, store, restorer):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, broken)
            save(device, store, 0, 1, 2)
            settle(store)
        lost = tally(store, Tier.DISK).failed
        assert lost > 0
        assert [record.exc_info is not None for record in caplog.records] == [True]
        for number in (3, 4, 5):
            save(device, store, number)
            settle(store)
        assert tally(store, Tier.DISK).failed == lost
        assert tally(store, Tier.DISK).blocks > 0
        assert [restore(device, restorer, number) for number in (3, 4, 5)] == [1, 1, 1]


@pytest.mark.parametrize("tensor", [False, True])
def test_of_several_blocks_read_in_one_go_the_unreadable_one_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: bool
) -> None:
    read = SlotFile.read
    with opened(tmp_path, host_slots=2, disk_slots=8, device=Device(tensor=tensor)) as (device, store, restorer):
        for number in range(6):
            save(device, store, number)
            settle(store)
        entries = store.pin([name(number) for number in range(4)])
        store.release(entries)
        assert [entry.tier for entry in entries] == [Tier.DISK] * 4
        bad = entries[2].slot

        def reads(file: SlotFile, slot: int, targets: Sequence[Bytes]) -> None:
            if slot <= bad < slot + len(targets):
                raise OSError(5, "Input/output error")
            read(file, slot, targets)

        monkeypatch.setattr(SlotFile, "read", reads)
        assert restore(device, restorer, 0, 1, 2, 3) == 2
        assert tally(store, Tier.DISK).failed == 1
        assert [restore(device, restorer, number) for number in range(4)] == [1, 1, 0, 1]


def test_what_was_computed_wrong_is_in_neither_tier_and_not_there_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        for number in range(6):
            save(device, store, number)
            settle(store)
        where = dict(store.contents().changes)
        wrong = [next(n for n in range(6) if where[name(n)] is tier) for tier in Tier]
        store.save([], (), [name(number) for number in [*wrong, 77]])
        assert [dict(store.news().changes).get(name(number)) for number in wrong] == [None, None]
        assert [restore(device, restorer, number) for number in wrong] == [0, 0]
        sound = [number for number in range(6) if number not in wrong]
        assert [restore(device, restorer, number) for number in sound] == [1] * 4
        for number in range(10, 16):
            save(device, store, number)
            settle(store)
    with opened(tmp_path, host_slots=2, disk_slots=8) as (_, store, _):
        assert not {name(number) for number in wrong} & set(dict(store.contents().changes))


def test_a_wrong_block_that_is_saved_only_now_or_on_its_way_to_disk_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, writing, write = threading.Event(), threading.Event(), SlotFile.write

    def slow(file: SlotFile, *args: object) -> None:
        writing.set()
        assert gate.wait(30)
        write(file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SlotFile, "write", slow)
    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        save(device, store, 0, 1)
        assert writing.wait(30)
        (spilling,) = store._spilling
        device.fill(0, name(5))
        store.save([(name(5), 0)], (), [spilling, name(5)])
        assert store.pin([spilling]) == []
        assert store.pin([name(5)]) == []
        gate.set()
        settle(store)
        save(device, store, 6)
        assert restore(device, restorer, 6) == 1
    with opened(tmp_path, host_slots=2, disk_slots=8) as (_, store, _):
        assert not {spilling, name(5)} & set(dict(store.contents().changes))


def test_a_disk_on_which_nothing_can_be_erased_is_empty_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        for number in range(4):
            save(device, store, number)
            settle(store)
        where = dict(store.contents().changes)
        first, second, *_ = (number for number in range(4) if where[name(number)] is Tier.DISK)
        with monkeypatch.context() as patch:
            patch.setattr(SlotFile, "blank", broken)
            store.save([], (), [name(first)])
        assert restore(device, restorer, first) == 0
        assert restore(device, restorer, second) == 1
    with opened(tmp_path, host_slots=2, disk_slots=8) as (_, store, _):
        assert not store.contents().changes


def test_a_block_that_could_not_be_read_is_not_found_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        for number in range(4):
            save(device, store, number)
            settle(store)
        on_disk = [block_hash for block_hash, tier in store.contents().changes if tier is Tier.DISK]
        with monkeypatch.context() as patch:
            patch.setattr(SlotFile, "read", broken)
            victim = next(number for number in range(4) if name(number) == on_disk[0])
            assert restore(device, restorer, victim) == 0
    with opened(tmp_path, host_slots=2, disk_slots=8) as (_, store, _):
        assert name(victim) not in dict(store.contents().changes)


def test_a_slow_disk_never_holds_up_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = SlotFile.write

    def slow(file: SlotFile, *args: object) -> None:
        assert gate.wait(30)
        write(file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SlotFile, "write", slow)
    with opened(tmp_path, host_slots=2, disk_slots=8) as (device, store, restorer):
        for number in range(6):
            save(device, store, number)
        assert restore(device, restorer, 5) == 1
        assert tally(store, Tier.HOST).evicted >= 4
        gate.set()


class StoreMachine(RuleBasedStateMachine):
    """Chains are 10·c, 10·c + 1, …; what a restore brings is compared with what the name stands for."""

    @initialize(host_slots=st.integers(1, 5), disk_slots=st.integers(0, 5))
    def open(self, host_slots: int, disk_slots: int) -> None:
        self.folder = TemporaryDirectory()
        self.disk_slots = disk_slots
        self.host_slots = host_slots
        self.damaged: set[bytes] = set()
        self.start()

    def start(self) -> None:
        self.device = Device()
        disk = open_disk(Path(self.folder.name), self.disk_slots) if self.disk_slots else None
        self.disk = disk
        self.store = make_store(self.device, host_slots=self.host_slots, disk=disk)
        self.restorer = Restorer(self.store, self.device.blocks)
        self.mirror = dict(self.store.contents().changes)

    def hear(self) -> None:
        for block_hash, tier in self.store.news().changes:
            self.mirror.pop(block_hash, None)
            if tier:
                self.mirror[block_hash] = tier

    @rule(chain=st.integers(0, 3), length=st.integers(1, 4))
    def save(self, chain: int, length: int) -> None:
        save(self.device, self.store, *range(10 * chain, 10 * chain + length))

    @rule(chain=st.integers(0, 3), length=st.integers(1, 4))
    def restore(self, chain: int, length: int) -> None:
        restore(self.device, self.restorer, *range(10 * chain, 10 * chain + length))

    @rule(chain=st.integers(0, 3), length=st.integers(1, 4))
    def delete(self, chain: int, length: int) -> None:
        wrong = [name(number) for number in range(10 * chain, 10 * chain + length)]
        self.store.save([], (), wrong)
        settle(self.store)
        self.hear()
        assert not set(wrong) & set(self.mirror)

    @rule(choice=st.integers(0, 50))
    def damage(self, choice: int) -> None:
        settle(self.store)
        self.hear()
        if held := sorted(self.mirror):
            (source,) = self.store.pin([held[choice % len(held)]])
            if source.tier is Tier.HOST:
                self.store.host_rows[source.slot][choice] ^= 1
            self.store.release([source])

    @precondition(lambda self: self.disk_slots)
    @rule()
    def restart(self) -> None:
        settle(self.store)
        self.hear()
        on_disk = set(self.disk.hashes()) if self.disk else set()
        self.store.close(5)
        self.device.close()
        self.start()
        assert set(self.mirror) == on_disk

    @invariant()
    def at_rest_every_slot_is_free_or_holds_one_block(self) -> None:
        settle(self.store)
        host = self.store._host
        slots = [entry.slot for entry in host._entries.values()] + host._free
        assert sorted(slots) == list(range(host.num_slots))
        assert not any(entry.pins for entry in host._entries.values())
        if self.disk:
            used = [entry.slot for entry in self.disk._entries.values()] + self.disk._free
            assert sorted(used) == list(range(self.disk.file.num_slots))
            assert set(self.disk._order) == set(self.disk._entries)
        self.hear()
        assert set(self.mirror) == set(host.hashes()) | set(self.disk.hashes() if self.disk else ())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close(5)
            self.device.close()
            self.folder.cleanup()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
