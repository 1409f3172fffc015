"""Whatever happens to bytes, tickets or layouts on the way, a pull verifies the right bytes or fails; never both."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import msgspec
import numpy as np
import pytest

from pdserve.core.errors import DigestMismatch, LayoutMismatch, StaleEpoch, TransferError
from pdserve.core.layout import KVOrder
from pdserve.core.protocols import PeerAddress, PullSpec
from pdserve.core.ticket import region_seed
from pdserve.transfer.base import ReadPlan
from pdserve.transfer.copying import Copied
from pdserve.transfer.host_spans import digest_spans
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from tests.kv_layouts import kv_layout

LAYOUT = kv_layout(32)
OTHER_ORDER = replace(LAYOUT, order=KVOrder.LAYER_MAJOR)
SOURCE_EPOCH, OLD_EPOCH = 11, 10
TARGETS = (20, 21, 22)

Damage = Callable[[HostMemory, ReadPlan], None]


class DamagingBackend(LoopbackBackend):
    """Copies, then damages what has arrived before it is digested, on every read alike."""

    def __init__(self) -> None:
        super().__init__()
        self.damage: Damage | None = None
        self.damaged_reads = 0

    def post(self, peer_id: str, plan: ReadPlan) -> Copied:
        if self.damage is None:
            return super().post(peer_id, plan)
        transfer = super().post(peer_id, replace(plan, digest=None))
        self.damage(self._memory, plan)
        self.damaged_reads += 1
        if plan.digest is not None:
            [plan.digest.value] = digest_spans(self._memory.array, plan.local, plan.lengths, [plan.digest.seed])
        return transfer


@dataclass
class Pair:
    random: Random
    source: LocalTransferService
    source_memory: HostMemory
    target: LocalTransferService
    target_memory: HostMemory
    backend: DamagingBackend
    tickets: int = 0

    def fresh(self) -> None:
        """New KV everywhere, so that nothing is right by accident."""
        numbers = np.random.default_rng(self.random.getrandbits(64))
        for memory in (self.source_memory, self.target_memory):
            memory.array[: LAYOUT.total_bytes] = numbers.integers(0, 256, LAYOUT.total_bytes, dtype=np.uint8)

    async def offered(self, *, epoch: int = SOURCE_EPOCH, first_block: int = 0) -> PullSpec:
        """A region of two or three blocks of a new ticket, as the target would ask for it."""
        self.tickets += 1
        seed = region_seed(f"ticket-{self.tickets}", epoch, first_block)
        blocks = tuple(self.random.sample(range(16), self.random.randint(2, 3)))
        digest = await self.source.digest(blocks, len(blocks) * LAYOUT.block_size, seed)
        return PullSpec(
            peer="p",
            epoch=SOURCE_EPOCH,
            source_blocks=blocks,
            target_blocks=TARGETS[: len(blocks)],
            digest=digest,
            seed=seed,
            deadline=30.0,
            start_within=30.0,
        )

    async def verifies(self, spec: PullSpec) -> bool:
        """Whether the pull delivers; what it delivers must be what the source holds in those blocks."""
        pull = self.target.pull(spec)
        try:
            await pull.wait()
        except (DigestMismatch, StaleEpoch):
            return False
        finally:
            await pull.settled()
        size = LAYOUT.block_bytes
        for theirs, ours in zip(spec.source_blocks, spec.target_blocks, strict=True):
            arrived = self.target_memory.array[ours * size : (ours + 1) * size]
            np.testing.assert_array_equal(arrived, self.source_memory.array[theirs * size : (theirs + 1) * size])
        return True

    async def verifies_damaged(self, spec: PullSpec, damage: Damage) -> bool:
        self.backend.damage = damage
        try:
            return await self.verifies(spec)
        finally:
            self.backend.damage = None


@asynccontextmanager
async def opened(seed: int) -> AsyncIterator[Pair]:
    memories = HostMemory(LAYOUT.total_bytes + (4 << 20)), HostMemory(LAYOUT.total_bytes + (4 << 20))
    backend = DamagingBackend()
    source = await LocalTransferService.open(
        engine_id="p", epoch=SOURCE_EPOCH, layout=LAYOUT, memory=memories[0], backends=(LoopbackBackend(),)
    )
    target = await LocalTransferService.open(
        engine_id="d", epoch=22, layout=LAYOUT, memory=memories[1], backends=(backend,)
    )
    try:
        await target.connect(source.address)
        pair = Pair(Random(seed), source, memories[0], target, memories[1], backend)
        pair.fresh()
        yield pair
    finally:
        await target.close()
        await source.close()


def arrived_bytes(plan: ReadPlan) -> list[int]:
    """Offsets of the target memory that the read fills, in order."""
    spans = zip(plan.local.tolist(), plan.lengths.tolist(), strict=True)
    return [offset + i for offset, length in spans for i in range(length)]


async def bit_flip(pair: Pair) -> bool:
    spec, chance = await pair.offered(), pair.random.random()
    bit = 1 << pair.random.randrange(8)

    def flip(memory: HostMemory, plan: ReadPlan) -> None:
        offsets = arrived_bytes(plan)
        memory.array[offsets[int(chance * len(offsets))]] ^= bit

    return await pair.verifies_damaged(spec, flip)


async def truncation(pair: Pair) -> bool:
    spec, chance = await pair.offered(), pair.random.random()

    def cut(memory: HostMemory, plan: ReadPlan) -> None:
        rest = arrived_bytes(plan)[int(chance * plan.num_bytes) :]
        memory.array[rest] = ~memory.array[rest]  # other bytes lie where these did not arrive

    return await pair.verifies_damaged(spec, cut)


async def swapped_regions(pair: Pair) -> bool:
    """The bytes of one region under the digest of another, or of the same blocks in another order."""
    spec = await pair.offered()
    if pair.random.getrandbits(1):
        return await pair.verifies(replace(spec, source_blocks=spec.source_blocks[::-1]))
    others = tuple(block for block in range(16) if block not in spec.source_blocks)[: len(spec.source_blocks)]
    return await pair.verifies(replace(spec, source_blocks=others))


async def stale_epoch(pair: Pair) -> bool:
    """A region of the incarnation before: named openly, or with bytes that happen to be equal."""
    if pair.random.getrandbits(1):
        return await pair.verifies(replace(await pair.offered(), epoch=OLD_EPOCH))
    stale = await pair.offered(epoch=OLD_EPOCH)
    return await pair.verifies(replace(stale, seed=region_seed(f"ticket-{pair.tickets}", SOURCE_EPOCH, 0)))


async def wrong_layout(pair: Pair) -> bool:
    """A source that says it keeps its blocks in another order than it does."""
    await pair.target.disconnect("p")
    await pair.target.connect(claiming_order(pair.source.address, OTHER_ORDER.order))
    try:
        return await pair.verifies(await pair.offered())
    finally:
        await pair.target.disconnect("p")
        await pair.target.connect(pair.source.address)


async def replayed_frame(pair: Pair) -> bool:
    """A region said for another ticket, or for another place in the same prompt; its bytes have not changed."""
    spec = await pair.offered()
    if pair.random.getrandbits(1):
        return await pair.verifies(replace(spec, seed=region_seed(f"ticket-{pair.tickets + 1}", SOURCE_EPOCH, 0)))
    return await pair.verifies(replace(spec, seed=region_seed(f"ticket-{pair.tickets}", SOURCE_EPOCH, 3)))


def claiming_order(address: PeerAddress, order: KVOrder) -> PeerAddress:
    (rank,) = address.ranks
    offers = tuple(
        (name, msgspec.msgpack.encode(msgspec.msgpack.decode(offer, type=dict[str, object]) | {"order": order}))
        for name, offer in rank.backends
    )
    return replace(address, ranks=(replace(rank, backends=offers),))


CORRUPTIONS: tuple[Callable[[Pair], Awaitable[bool]], ...] = (
    bit_flip,
    truncation,
    swapped_regions,
    stale_epoch,
    wrong_layout,
    replayed_frame,
)


async def inject(count: int, seed: int) -> None:
    injected: Counter[str] = Counter()
    async with opened(seed) as pair:
        for number in range(count):
            corruption = CORRUPTIONS[number % len(CORRUPTIONS)]
            if number % 50 == 0:
                pair.fresh()
            assert not await corruption(pair), f"{corruption.__name__} number {number} of seed {seed} was not noticed"
            injected[corruption.__name__] += 1
            if number % 10 == 0:
                assert await pair.verifies(await pair.offered()), "what is right must still pass"
    assert injected.total() == count


async def move_clean(count: int, seed: int) -> None:
    async with opened(seed) as pair:
        for number in range(count):
            if number % 1000 == 0:
                pair.fresh()
            assert await pair.verifies(await pair.offered()), f"false alarm at region {number} of seed {seed}"
        assert pair.target.stats().rereads == 0


async def test_every_kind_of_corruption_is_detected() -> None:
    await inject(300, seed=1)


async def test_clean_regions_raise_no_alarm() -> None:
    await move_clean(500, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_ten_thousand_corruptions_are_all_detected() -> None:
    await inject(10_000, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_clean_regions_raise_no_alarm() -> None:
    await move_clean(100_000, seed=4)


@pytest.mark.parametrize("change", [{"model_revision": "other"}, {"block_size": 8}])
async def test_kv_of_another_form_is_refused_before_anything_is_read(change: dict[str, object]) -> None:
    layout = replace(LAYOUT, **change)  # type: ignore[arg-type]
    async with opened(5) as pair:
        stranger = await LocalTransferService.open(
            engine_id="q",
            epoch=5,
            layout=layout,
            memory=HostMemory(2 * LAYOUT.total_bytes),
            backends=(LoopbackBackend(),),
        )
        with pytest.raises(LayoutMismatch):
            await pair.target.connect(stranger.address)
        with pytest.raises(TransferError):
            await pair.target.pull(replace(await pair.offered(), peer="q", epoch=5)).wait()
        await stranger.close()
