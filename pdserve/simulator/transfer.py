"""core.protocols.TransferService without memory: a pull takes latency, its turn on two ports, and its bytes."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.core.clock import Clock
from pdserve.core.errors import LayoutMismatch, StaleEpoch, TransferError, TransferFailed, TransferTimeout
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import PeerAddress, PullReceipt, PullSpec
from pdserve.core.shards import KVPart
from pdserve.simulator.node import Node
from pdserve.simulator.profile import Links

BACKEND = "simulated"


@dataclass(slots=True)
class Port:
    """One engine's side of the KV network; the times (monotonic) at which each direction is free again."""

    node: Node
    domain: str = ""
    out_free_at: float = 0.0
    in_free_at: float = 0.0


Fabric = Mapping[tuple[str, int], Port]
"""(engine id, epoch) → port, of every incarnation there has been."""


@dataclass(slots=True)
class SimTransfer:
    """The service of one engine. Bytes are right by construction: only time and death are simulated."""

    layout: KVLayout
    address: PeerAddress
    links: Links
    fabric: Fabric
    clock: Clock
    _peers: dict[str, PeerAddress] = field(default_factory=dict)

    async def connect(self, peer: PeerAddress) -> str:
        if peer.layout_hash != self.address.layout_hash:
            raise LayoutMismatch(f"{peer.engine_id} holds KV of another layout")
        await self.clock.sleep(2 * self.links.latency)
        self._peers[peer.engine_id] = peer
        return BACKEND

    async def disconnect(self, engine_id: str) -> None:
        self._peers.pop(engine_id, None)

    async def digest(self, blocks: tuple[int, ...], num_tokens: int, seed: int, part: KVPart | None = None) -> bytes:
        await self.clock.sleep(len(blocks) * self.layout.block_bytes / self.links.verify)
        return seed.to_bytes(8, "little")

    def pull(self, spec: PullSpec) -> "SimPull":
        loop = asyncio.get_running_loop()
        peer = self._peers.get(spec.peer)
        if peer is None or peer.epoch != spec.epoch:
            error = StaleEpoch(f"{spec.peer} is not the incarnation that holds these blocks")
            return SimPull(loop.create_future(), None, error)
        source = self.fabric[peer.engine_id, peer.epoch]
        carrying = loop.create_task(self._carry(spec, source), name=f"pull from {spec.peer}")
        pull = SimPull(loop.create_future(), carrying, None)
        late = TransferTimeout(f"no KV from {spec.peer} within {spec.deadline:g} s")
        pull.expire_after(spec.deadline, late)
        return pull

    async def _carry(self, spec: PullSpec, source: Port) -> PullReceipt:
        num_bytes = len(spec.target_blocks) * self.layout.block_bytes
        target = self.fabric[self.address.engine_id, self.address.epoch]
        begun = self.clock.monotonic()
        carried = self.links.per_pull + num_bytes / self._bandwidth(source, target)
        ends_at = max(begun, source.out_free_at, target.in_free_at) + carried
        source.out_free_at = target.in_free_at = ends_at
        await self.clock.sleep(ends_at - begun + self.links.latency)
        # A read through a frozen peer neither ends nor fails until the peer does.
        if not await source.node.until_running():
            raise TransferFailed(f"reading KV from {spec.peer} failed: it is gone")
        verify = num_bytes / self.links.verify
        await self.clock.sleep(verify)
        wire = self.clock.monotonic() - begun - verify
        return PullReceipt(backend=BACKEND, num_bytes=num_bytes, wire_seconds=wire, verify_seconds=verify)

    def _bandwidth(self, source: Port, target: Port) -> float:
        apart = source.domain and target.domain and source.domain != target.domain
        return (apart and self.links.far_bandwidth) or self.links.bandwidth


class SimPull:
    """core.protocols.Pull over the task that carries the bytes, or over the error it was refused with."""

    def __init__(
        self,
        outcome: "asyncio.Future[PullReceipt]",
        carrying: "asyncio.Task[PullReceipt] | None",
        refused: TransferError | None,
    ) -> None:
        self._outcome = outcome
        self._carrying = carrying
        self._timer: asyncio.TimerHandle | None = None
        if carrying:
            carrying.add_done_callback(self._on_carried)
        if refused:
            self._fail(refused)

    async def wait(self) -> PullReceipt:
        return await asyncio.shield(self._outcome)

    async def settled(self) -> None:
        if self._carrying:
            await asyncio.wait([self._carrying])

    def cancel(self) -> None:
        self._fail(TransferFailed("the pull was cancelled"))

    def expire_after(self, seconds: float, error: TransferError) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._fail, error)

    def _on_carried(self, task: "asyncio.Task[PullReceipt]") -> None:
        if self._timer:
            self._timer.cancel()
        # Read in any case: the pull may have been given up before.
        error = None if task.cancelled() else task.exception()
        if self._outcome.done() or task.cancelled():
            return
        if isinstance(error, TransferError):
            self._fail(error)
        elif error:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(task.result())

    def _fail(self, error: TransferError) -> None:
        if not self._outcome.done():
            self._outcome.set_exception(error)
            # Read here once: an outcome nobody waits for is no error of the program.
            self._outcome.exception()
