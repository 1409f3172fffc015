"""Two prefill and two decode engines, and the clients that watch their answers."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any
from weakref import WeakSet

from pdserve.core.blocks import block_hashes, hash_namespace
from pdserve.core.endpoint import Role
from pdserve.core.errors import PdserveError
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.ticket import Departure, KVSource, TransferTicket
from pdserve.dispatch.replay import continued
from pdserve.engine.core import EngineCore
from pdserve.engine.live_requests import EngineItem
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.kvcache.block_pool import BlockState
from pdserve.simulator.node import Node
from pdserve.simulator.virtual_time import VirtualClock
from pdserve.transfer.pump import TransferPump
from tests.model_check.device import BLOCK_SIZE, Meanings, Prefix, answer_to
from tests.model_check.incarnation import REVISION, TIMES, Incarnation, open_incarnation
from tests.model_check.inline import InlineLoop, without_threads_and_sockets
from tests.model_check.network import LATENCY, Network, Stream
from tests.model_check.reads import Backend, Fabric, Read

SOURCES = ("p0", "p1")
TARGETS = ("d0", "d1")
PAIRS = tuple(permutations(SOURCES + TARGETS, 2))
"""(source, target) engines that KV may move between."""
WHO_HOLDS_MOST = "?"
READ_SECONDS = 0.02
REQUEST_TIMEOUT = 20.0


@dataclass(eq=False)
class Client:
    """One request and what came back. `late` tickets wait until the model check delivers them. A request that moves
    to another engine is a client of its own there, whose answer goes on behind its predecessor's."""

    request: Request
    prefill: str
    decode: str
    late: bool
    tokens: list[int] = field(default_factory=list)
    ticket: TransferTicket | None = None
    ended: bool = False
    handed_over: bool = False
    predecessor: "Client | None" = None

    @property
    def offset(self) -> int:
        """Tokens of the predecessor's answer that are in this one's prompt."""
        ours, theirs = self.request, self.predecessor.request if self.predecessor else self.request
        return len(ours.prompt_token_ids) - len(theirs.prompt_token_ids)


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
        self._patches.enter_context(without_threads_and_sockets(self.network, self._pumps, self.accuse))
        self._loop = InlineLoop()
        self._loop.set_exception_handler(lambda _, context: self.accuse(f"{context.get('exception') or context}"))
        self._clock = VirtualClock(self._loop)
        self._run(self._start_all())

    # What a model check does.

    def advance(self, seconds: float) -> None:
        self._run(asyncio.sleep(seconds))

    def submit(
        self, prompt: Prefix, max_tokens: int, prefill: str, decode: str, *, late: bool, lender: str = ""
    ) -> None:
        """Prefill and decode on one engine is a request without a handoff. lender: who the engine that computes the
        prompt is told to ask for it."""
        sampling = SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True)
        name = f"r{len(self.clients)}"
        request = Request(id=name, prompt_token_ids=prompt, sampling=sampling, timeout=REQUEST_TIMEOUT)
        client = Client(request, prefill, decode, late)
        self.clients.append(client)
        if lender == WHO_HOLDS_MOST:
            lender = self.holder(prompt, prefill)
        source = self._hint(lender, prompt) if lender not in ("", prefill) else None
        self._start(prefill, client, handoff=prefill != decode, source=source)

    def holder(self, prompt: Prefix, other_than: str) -> str:
        """Which other engine has cached most of a prompt; empty when none has."""
        hashes = block_hashes(prompt, BLOCK_SIZE, hash_namespace(b"", REVISION))
        held = {
            engine_id: len(incarnation.engine._core.kv._cache.lookup(hashes))
            for engine_id, incarnation in self.incarnations.items()
            if engine_id != other_than
        }
        best = max(sorted(held), key=lambda engine_id: held[engine_id])
        return best if held[best] else ""

    def _hint(self, lender: str, prompt: Prefix) -> KVSource:
        endpoint = self.incarnations[lender].engine.endpoint
        return KVSource(
            engine_id=lender, epoch=endpoint.epoch, address=endpoint.address, num_blocks=len(prompt) // BLOCK_SIZE + 1
        )

    def deliver_ticket(self, client: Client) -> None:
        ticket, client.ticket = client.ticket, None
        assert ticket is not None
        self._start(client.decode, client, ticket=ticket)

    def migrate(self, client: Client, target: str, *, late: bool) -> None:
        """What a gateway does: asks the engine that decodes, and has another one go on with what that answers."""
        source = self.incarnations[client.decode]

        def answered(answer: Departure | PdserveError) -> None:
            if isinstance(answer, Departure) and source.node.alive:
                request = continued(client.request, answer.output_token_ids, f"r{len(self.clients)}")
                moved = Client(request, client.decode, target, late, ticket=answer.ticket, predecessor=client)
                self.clients.append(moved)
                if not late:
                    self._loop.call_later(LATENCY, self._hand_over, moved)

        self._loop.call_soon(source.node.run, lambda: source.engine.depart(client.request.id, answered))

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
        for source, target in PAIRS:
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
            if len(engine._requests) or engine.source.num_open or engine._target._fetches:
                found.append(
                    f"{name} serves {engine._requests.ids}, {engine.source.num_open}, {engine._target._fetches}"
                )
            if engine._restoring.num_fetches:
                found.append(f"{name} has {engine._restoring.num_fetches} fetches from caches")
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
            for block in self._awaited(core, sequence)
        }
        loose = [
            block
            for block in read.target_blocks
            if core.kv._pool.state(block) is not BlockState.QUARANTINED and block not in waiting
        ]
        if loose:
            self.accuse(f"bytes land in blocks {loose} of {target.engine_id}, which are others'")

    def _awaited(self, core: EngineCore, sequence: Sequence) -> Iterable[int]:
        if sequence.num_restoring_tokens:
            return core._scheduler.restore_blocks(sequence)[1]
        return core._scheduler.fetch_blocks(sequence).values()

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
            if item.token_ids and client.handed_over and engine_id == client.decode:
                self.accuse(f"{engine_id} decodes {client.request.id}, which it has handed over")
            if item.token_ids and client.predecessor and not client.tokens:
                self._continue(client, client.predecessor, item.index)
            client.handed_over |= item.finish_reason is FinishReason.HANDOFF and engine_id == client.decode
            client.tokens[item.index :] = item.token_ids
            if tuple(client.tokens) != expected[: len(client.tokens)]:
                self.accuse(f"{engine_id} answers {client.request.id} with {client.tokens}, not {expected}")
            complete = item.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
            if complete and len(client.tokens) < len(expected):
                self.accuse(f"{engine_id} ends {client.request.id} after {client.tokens}, not {expected}")
            client.ended = client.ended or (item.finish_reason not in (None, FinishReason.HANDOFF))

    def _continue(self, client: Client, predecessor: Client, index: int) -> None:
        """The first tokens at the engine a request moved to stand right behind the last of the one it left."""
        if not predecessor.handed_over:
            self.accuse(f"{client.decode} decodes {predecessor.request.id} along with {predecessor.decode}")
        client.tokens = predecessor.tokens[client.offset :]
        if index != len(client.tokens):
            self.accuse(f"{client.request.id} goes on at token {index} behind {len(client.tokens)}")

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
        self._epochs += 1
        self.incarnations[engine_id] = await open_incarnation(
            engine_id,
            self._epochs,
            Role.PREFILL if engine_id in SOURCES else Role.DECODE,
            clock=self._clock,
            network=self.network,
            fabric=self.fabric,
            meanings=self._meanings,
            accuse=self.accuse,
        )

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
