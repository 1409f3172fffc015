"""One engine of the model check: real but for model, wire and clock."""

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineLimits, EngineState, Role
from pdserve.core.errors import PdserveError
from pdserve.core.protocols import ModelInfo
from pdserve.engine.engine import Engine
from pdserve.engine.handoff_link import HandoffLink
from pdserve.engine.server import HandoffService
from pdserve.engine.source_link import SourceName
from pdserve.simulator.node import Node
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from tests.model_check.device import LAYOUT, NUM_BLOCKS, CheckedExecutor, Meanings
from tests.model_check.network import Listener, Network
from tests.model_check.reads import Backend, Fabric, Side

TIMES = Times(
    transfer_deadline=4.0,
    heartbeat=0.5,
    suspect=3.0,
    lease=2.0,
    lease_guard=0.2,
    release_answer=1.0,
    fetch_deadline=1.5,
)

REVISION = "r"
_INFO = ModelInfo(name="toy", revision=REVISION, vocab_size=1 << 20, max_model_len=2 * NUM_BLOCKS, eos_token_ids=())


@dataclass(eq=False)
class Incarnation:
    engine_id: str
    node: Node
    engine: Engine
    transfer: LocalTransferService
    side: Side

    @property
    def up(self) -> bool:
        return self.node.alive and not self.node.frozen


async def open_incarnation(
    engine_id: str,
    epoch: int,
    role: Role,
    *,
    clock: Clock,
    network: Network,
    fabric: Fabric,
    meanings: Meanings,
    accuse: Callable[[str], None],
) -> Incarnation:
    """A new incarnation at the address of the last, which is the engine's id."""
    node, memory = Node(clock), HostMemory(LAYOUT.total_bytes)
    side = Side(engine_id, node, memory)
    caller = f"{engine_id}/{epoch}"
    transfer = await LocalTransferService.open(
        engine_id=engine_id,
        epoch=epoch,
        layout=LAYOUT,
        memory=memory,
        backends=(Backend(fabric, caller.encode(), side),),
        clock=node.clock,
    )
    network.callers[caller] = node

    def open_link(source: SourceName, on_failure: Callable[[PdserveError], None]) -> HandoffLink:
        return HandoffLink(
            engine_id=source.engine_id,
            epoch=source.epoch,
            address=f"{caller}>{source.address}",
            transfer=transfer,
            times=TIMES,
            clock=node.clock,
            on_failure=on_failure,
        )

    engine = Engine(
        endpoint=Endpoint(
            engine_id=engine_id, role=role, epoch=epoch, address=engine_id, pid=0, state=EngineState.READY
        ),
        info=_INFO,
        limits=EngineLimits(max_tokens_per_step=8, max_rows=4, chunk_size=3, max_model_len=2 * NUM_BLOCKS),
        executor=CheckedExecutor(memory, meanings, node.clock, accuse),
        transfer=transfer,
        open_link=open_link,
        times=TIMES,
        clock=node.clock,
    )
    await engine.__aenter__()
    network.listeners[engine_id] = Listener(node, HandoffService(engine))
    return Incarnation(engine_id, node, engine, transfer, side)
