"""Opens sources and targets of one kind of transfer backend, for the suites that compare the kinds."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from pdserve.core.layout import KVLayout
from pdserve.core.protocols import PullReceipt, PullSpec, TransferService
from pdserve.transfer.backends import make_backends
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from tests.contract.source_host import Open
from tests.contract.sources import Driver, InChild, InProcess, Source

SEED = 2**63 + 5
Blocks = tuple[int, ...]
_EPOCHS = count(1)


@dataclass(frozen=True)
class Kind:
    backend: str
    env: Mapping[str, str] = field(default_factory=dict)
    own_process: bool = True

    def __str__(self) -> str:
        return "-".join((self.backend, *self.env.values()))

    def driver(self) -> "InChild | InProcess":
        return InChild(self.env) if self.own_process else InProcess()


KINDS = (
    Kind("loopback", own_process=False),
    Kind("shared_memory"),
    Kind("nixl"),
    Kind("nixl", {"UCX_TLS": "tcp"}),
    Kind("gloo"),
    Kind("grpc"),
)


@dataclass
class Bench:
    """Opens sources and targets of one kind and closes the targets."""

    kind: Kind
    driver: Driver
    stack: AsyncExitStack

    async def source(self, layout: KVLayout, *, driver: Driver | None = None, engine_id: str = "p") -> Source:
        epoch = next(_EPOCHS)
        command = Open(engine_id, epoch, layout, (self.kind.backend,), fill=epoch)
        return await Source.open(driver or self.driver, command)

    async def doomed_source(
        self, layout: KVLayout, engine_id: str = "p", prefix: tuple[str, ...] = ()
    ) -> tuple[Source, InChild]:
        """A source in a process of its own, started by the prefix, for the test to kill, freeze or cut off."""
        child = InChild(self.kind.env, prefix)
        self.stack.callback(child.end)
        return await self.source(layout, driver=child, engine_id=engine_id), child

    async def target(self, layout: KVLayout) -> tuple[LocalTransferService, HostMemory]:
        memory, epoch = HostMemory(layout.total_bytes), next(_EPOCHS)
        memory.array[:] = np.random.default_rng(epoch).integers(0, 256, memory.nbytes, dtype=np.uint8)
        backends = make_backends((self.kind.backend,), "d", epoch)
        service = await LocalTransferService.open(
            engine_id="d", epoch=epoch, layout=layout, memory=memory, backends=backends
        )
        self.stack.push_async_callback(service.close)
        return service, memory


async def spec_for(source: Source, source_blocks: Blocks, target_blocks: Blocks, deadline: float = 10.0) -> PullSpec:
    digest = await source.digest(source_blocks, len(source_blocks) * source.layout.block_size, SEED)
    return PullSpec(
        peer=source.address.engine_id,
        epoch=source.address.epoch,
        source_blocks=source_blocks,
        target_blocks=target_blocks,
        digest=digest,
        seed=SEED,
        deadline=deadline,
        start_within=deadline,
    )


async def pull(service: TransferService, spec: PullSpec) -> PullReceipt:
    running = service.pull(spec)
    try:
        return await running.wait()
    finally:
        await asyncio.wait_for(running.settled(), 5)
