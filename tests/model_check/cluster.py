"""Two prefill and two decode engines, real but for model, wire and clock, and the clients that watch their answers."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch
from weakref import WeakSet

from pdserve.config.times import Times
from pdserve.core.endpoint import Endpoint, EngineLimits, EngineState, Role
from pdserve.core.errors import PdserveError
from pdserve.core.protocols import ModelInfo
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.ticket import TransferTicket
from pdserve.engine.engine import Engine, EngineItem
from pdserve.engine.handoff_link import HandoffLink
from pdserve.engine.sequence import SequenceState
from pdserve.engine.server import HandoffService
from pdserve.engine.source_link import SourceName
from pdserve.kvcache.block_pool import BlockState
from pdserve.simulator.node import Node
from pdserve.simulator.virtual_time import VirtualClock, VirtualTimeLoop
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.pump import TransferPump
from pdserve.transfer.service import LocalTransferService
from tests.model_check.device import LAYOUT, NUM_BLOCKS, CheckedExecutor, Meanings, Prefix, answer_to
from tests.model_check.network import LATENCY, Listener, Network, Stream, Stub
from tests.model_check.reads import Backend, Fabric, Read, Side

SOURCES = ("p0", "p1")
TARGETS = ("d0", "d1")
TIMES = Times(transfer_deadline=4.0, heartbeat=0.5, suspect=3.0, lease=2.0, lease_guard=0.2, release_answer=1.0)
READ_SECONDS = 0.02
REQUEST_TIMEOUT = 20.0

_INFO = ModelInfo(name="toy", revision="r", vocab_size=1 << 20, max_model_len=2 * NUM_BLOCKS, eos_token_ids=())
_T = TypeVar("_T")


class InlineLoop(VirtualTimeLoop):
    """Virtual time, without threads: what would run in one runs at once."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., _T], *args: Any
    ) -> "asyncio.Future[_T]":
        done: asyncio.Future[_T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _NoThread:
    """A pump's thread that never runs: jobs run where they are submitted, polls when the fabric says so."""

    def __init__(self, **_: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass

    def is_alive(self) -> bool:
        return False


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


@dataclass(eq=False)
class Client:
    """One request and what came back. `late` tickets wait until the model check delivers them."""

    request: Request
    prefill: str
    decode: str
    late: bool
    tokens: list[int] = field(default_factory=list)
    ticket: TransferTicket | None = None
    ended: bool = False


class Cluster:
    """Driven from outside the loop: every method but the callbacks is synchronous, `advance` lets time pass.

    accusations hold every broken promise, in words.
    """

    def __init__(self) -> None:
        self.accusations: list[str] = []
        self.clients: list[Client] = []
        self.incarnations: dict[str, Incarnation] = {}
        self.held: set[tuple[str, str]] = set()
        """(source, target) engines between which reads stay in flight."""
        self.network = Network(self.accuse)
        self.fabric = Fabric(self._on_post, self._on_land, self._poll)
        self._meanings = Meanings()
        self._epochs = 0
        self._pumps: WeakSet[TransferPump] = WeakSet()
        self._background: set[asyncio.Task[None]] = set()
        self._patches = ExitStack()
        self._patches.enter_context(self._without_threads_and_sockets())
        self._loop = InlineLoop()
        self._loop.set_exception_handler(lambda _, context: self.accuse(f"{context.get('exception') or context}"))
        self._clock = VirtualClock(self._loop)
        self._run(self._start_all())

    # What a model check does.

    def advance(self, seconds: float) -> None:
        self._run(asyncio.sleep(seconds))

    def submit(self, prompt: Prefix, max_tokens: int, prefill: str, decode: str, *, late: bool) -> None:
        sampling = SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True)
        name = f"r{len(self.clients)}"
        request = Request(id=name, prompt_token_ids=prompt, sampling=sampling, timeout=REQUEST_TIMEOUT)
        client = Client(request, prefill, decode, late)
        self.clients.append(client)
        self._start(prefill, client, handoff=True)

    def deliver_ticket(self, client: Client) -> None:
        ticket, client.ticket = client.ticket, None
        assert ticket is not None
        self._start(client.decode, client, ticket=ticket)

    def cancel(self, client: Client, engine_id: str) -> None:
        incarnation = self.incarnations[engine_id]
        incarnation.node.run(lambda: self._loop.call_soon(incarnation.engine.cancel, client.request.id))

    def kill(self, engine_id: str) -> None:
        dead = self.incarnations[engine_id]
        self.soon(dead.node.die)
        for read in list(self.fabric.reads):
            if read.source is dead.side:
                self._loop.call_later(LATENCY, self._end_of_read, read)
            elif read.target is dead.side:
                self.soon(partial(read.fail, "the reader is gone"))
        self._run(self._take_down(dead))

    def restart(self, engine_id: str) -> None:
        self._run(self._start_engine(engine_id))

    def thaw(self, engine_id: str) -> None:
        self._loop.call_soon(self.incarnations[engine_id].node.thaw)
        self.advance(0)

    def let_go(self, source: str, target: str) -> None:
        self.held.discard((source, target))
        for read in list(self.fabric.reads):
            if (read.source.engine_id, read.target.engine_id) == (source, target):
                self._loop.call_soon(self._end_of_read, read)

    def ends(self, stream: Stream) -> tuple[str, str]:
        """Ids of the source and the target engine of a line."""
        names = {incarnation.node: engine_id for engine_id, incarnation in self.incarnations.items()}
        return names[stream.listener.node], names[stream.caller]

    def soon(self, action: Callable[[], object]) -> None:
        """Do something on the loop."""
        self._loop.call_soon(action)
        self.advance(0)

    def come_to_rest(self) -> None:
        """No more faults; everything that is under way may end."""
        for incarnation in list(self.incarnations.values()):
            if incarnation.node.frozen:
                self.thaw(incarnation.engine_id)
        for stream in self.network.streams:
            stream.there.faults.clear()
            stream.back.faults.clear()
        if self.fabric.reads:
            self.advance(TIMES.transfer_deadline + TIMES.lease)
        for source in SOURCES:
            for target in TARGETS:
                self.let_go(source, target)
        for _ in range(int(REQUEST_TIMEOUT) + 2):
            if not self._unrest():
                return
            self.advance(1)

    def close(self) -> None:
        for incarnation in self.incarnations.values():
            if incarnation.node.alive:
                self._run(self._take_down(incarnation))
        self._run(self._end_tasks())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._patches.close()

    # What must hold.

    def check(self) -> None:
        """After every action."""
        assert not self.accusations, self.accusations
        for incarnation in self.incarnations.values():
            if incarnation.node.alive:
                incarnation.engine._core.kv.check()
                assert incarnation.engine._died is None, [t.exception() for t in incarnation.engine._tasks if t.done()]

    def check_rest(self) -> None:
        """Nothing is left of what was."""
        self.check()
        assert not self._unrest()

    def _unrest(self) -> list[str]:
        """What keeps engines from having everything free, in words."""
        found = [f"reads in flight: {len(self.fabric.reads)}"] if self.fabric.reads else []
        for name, incarnation in self.incarnations.items():
            engine = incarnation.engine
            if not incarnation.node.alive:
                continue
            counts = engine._core.kv.counts()
            if counts.free < counts.total:
                found.append(f"{name} has {counts}")
            if engine._live or engine.source.num_open or engine._target._fetches:
                found.append(f"{name} serves {engine._live}, {engine.source.num_open}, {engine._target._fetches}")
            if incarnation.transfer.stats().unsettled:
                found.append(f"{name} has unsettled pulls")
        return found

    def accuse(self, what: str) -> None:
        self.accusations.append(what)

    # Callbacks.

    def _on_post(self, read: Read) -> None:
        """A read starts only while its source vouches for the blocks."""
        source = self.incarnations[read.source.engine_id]
        if source.side is read.source and source.up:
            pool = source.engine._core.kv._pool
            loose = [block for block in read.source_blocks if not pool.leases(block)]
            if loose:
                self.accuse(f"{read.target.engine_id} starts reading {loose} of {source.engine_id} without a lease")
        if (read.source.engine_id, read.target.engine_id) not in self.held:
            self._loop.call_later(READ_SECONDS, self._end_of_read, read)

    def _on_land(self, read: Read) -> None:
        """Bytes arrive only in blocks that wait for them, or that nobody may touch."""
        target = self.incarnations[read.target.engine_id]
        if target.side is not read.target or not target.node.alive:
            return
        core = target.engine._core
        waiting = {
            block
            for sequence in core._sequences.values()
            if sequence.state is SequenceState.FETCHING
            for block in core.kv.block_ids(sequence, sequence.prompt_len)
        }
        loose = [
            block
            for block in read.target_blocks
            if core.kv._pool.state(block) is not BlockState.QUARANTINED and block not in waiting
        ]
        if loose:
            self.accuse(f"bytes land in blocks {loose} of {target.engine_id}, which are others'")

    def _end_of_read(self, read: Read) -> None:
        """Undisturbed, a read ends well; from a frozen engine it does not end, from a dead one it fails."""
        if read not in self.fabric.reads or (read.source.engine_id, read.target.engine_id) in self.held:
            return
        if read.source.node.frozen:
            self._loop.call_later(READ_SECONDS * 10, self._end_of_read, read)
        elif read.source.node.alive:
            read.finish()
        else:
            read.fail("the peer is gone")

    def _poll(self) -> None:
        for pump in list(self._pumps):
            assert isinstance(pump._backend, Backend)
            if not pump._backend.side.node.frozen:
                pump._poll()
                pump._drop_leaving()

    def _hear(self, client: Client, engine_id: str, node: Node, items: list[EngineItem]) -> None:
        if not node.alive:
            return
        for item in items:
            if isinstance(item, TransferTicket):
                client.ticket = item
                if not client.late:
                    self._loop.call_later(LATENCY, self._hand_over, client)
                continue
            expected = answer_to(client.request.prompt_token_ids, client.request.sampling.max_tokens)
            client.tokens[item.index :] = item.token_ids
            if tuple(client.tokens) != expected[: len(client.tokens)]:
                self.accuse(f"{engine_id} answers {client.request.id} with {client.tokens}, not {expected}")
            complete = item.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
            if complete and len(client.tokens) < len(expected):
                self.accuse(f"{engine_id} ends {client.request.id} after {client.tokens}, not {expected}")
            client.ended = client.ended or (item.finish_reason not in (None, FinishReason.HANDOFF))

    def _hand_over(self, client: Client) -> None:
        if client.ticket is not None:
            self.deliver_ticket(client)

    def _start(self, engine_id: str, client: Client, **how: Any) -> None:
        incarnation = self.incarnations[engine_id]
        engine, node = incarnation.engine, incarnation.node

        def start() -> None:
            try:
                engine.start(client.request, lambda items: self._hear(client, engine_id, node, items), **how)
            except PdserveError:
                client.ended = True

        self._loop.call_soon(node.run, start)

    # Building and taking down.

    async def _start_all(self) -> None:
        for engine_id in (*SOURCES, *TARGETS):
            await self._start_engine(engine_id)

    async def _start_engine(self, engine_id: str) -> None:
        """A new incarnation at the address of the last."""
        self._epochs += 1
        node, memory = Node(self._clock), HostMemory(LAYOUT.total_bytes)
        side = Side(engine_id, node, memory)
        transfer = await LocalTransferService.open(
            engine_id=engine_id,
            epoch=self._epochs,
            layout=LAYOUT,
            memory=memory,
            backends=(Backend(self.fabric, f"{engine_id}/{self._epochs}".encode(), side),),
            clock=node.clock,
        )
        caller = f"{engine_id}/{self._epochs}"
        self.network.callers[caller] = node

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

        role = Role.PREFILL if engine_id in SOURCES else Role.DECODE
        engine = Engine(
            endpoint=Endpoint(
                engine_id=engine_id, role=role, epoch=self._epochs, address=engine_id, pid=0, state=EngineState.READY
            ),
            info=_INFO,
            limits=EngineLimits(max_tokens_per_step=8, max_rows=4, chunk_size=3, max_model_len=2 * NUM_BLOCKS),
            executor=CheckedExecutor(memory, self._meanings, node.clock, self.accuse),
            transfer=transfer,
            open_link=open_link,
            times=TIMES,
            clock=node.clock,
        )
        await engine.__aenter__()
        self.incarnations[engine_id] = Incarnation(engine_id, node, engine, transfer, side)
        self.network.listeners[engine_id] = Listener(node, HandoffService(engine))

    async def _end_tasks(self) -> None:
        await asyncio.gather(*self._background, return_exceptions=True)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _take_down(self, incarnation: Incarnation) -> None:
        """Whatever a process leaves behind when it ends, of which nobody hears."""

        async def end() -> None:
            await incarnation.engine.__aexit__(None, None, None)
            await incarnation.transfer.close()

        task = asyncio.get_running_loop().create_task(end())
        self._background.add(task)
        await asyncio.sleep(0)

    def _run(self, work: Any) -> None:
        self._loop.run_until_complete(work)

    @contextmanager
    def _without_threads_and_sockets(self) -> Iterator[None]:
        def submit(pump: TransferPump, job: Callable[[], None]) -> bool:
            if pump._closing:
                return False
            self._pumps.add(pump)
            job()
            pump._poll()
            pump._drop_leaving()
            return True

        cluster = self

        class Log:
            """Hears of defects that were survived."""

            def exception(self, event: str, **_: object) -> None:
                cluster.accuse(event)

            error = exception

        with ExitStack() as stack:
            stack.enter_context(patch("pdserve.transfer.pump.threading.Thread", _NoThread))
            stack.enter_context(patch.object(TransferPump, "_submit", submit))
            stack.enter_context(patch("pdserve.engine.handoff_link.open_channel", self.network.open_channel))
            stack.enter_context(patch("pdserve.engine.handoff_link.HandoffServiceStub", Stub))
            for module in ("handoff_source", "handoff_target", "region_pulls", "prefix_fetches"):
                stack.enter_context(patch(f"pdserve.engine.{module}._log", Log()))
            yield
