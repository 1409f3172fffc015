"""KV over torch.distributed: the source sends what the target asks for, on a communicator of their own.

Pieces arrive in staging buffers and are copied into place from there, so that a cancelled read ends at once.
A pair whose read failed, stalled or was cancelled is broken off on both sides: nothing that was under way
reaches a later read. The next read opens a fresh pair.

Gloo may miss that the other end has died, and then waits for STALL. The control line does not: when it ends, so do all
reads of that peer, and the thread that waits in gloo is left to itself.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from secrets import token_bytes
from typing import TYPE_CHECKING

import msgspec

from pdserve.core.errors import ConfigError, TransferFailed
from pdserve.core.msgpack import Natural, Port, unpack
from pdserve.transfer.base import CONNECTED, ReadPlan, refused
from pdserve.transfer.communicator import (
    Communicator,
    GroupKind,
    check_available,
    finish_copies,
    memory_tensor,
    staging,
)
from pdserve.transfer.memory import KVMemory
from pdserve.transfer.pair_control import Ask, ControlLine, Granted, Hello, Welcome
from pdserve.transfer.pair_server import Admission, PairServer
from pdserve.transfer.spans import spans_fit
from pdserve.transfer.staged import StagedRead

if TYPE_CHECKING:
    from torch import Tensor

_ENDED = "the source has closed the pair"

CONNECT_LIMIT = 5.0
"""Seconds a source may take to answer a greeting."""

MAX_PIECE_BYTES = 1 << 26
_TOKEN_BYTES = 16


class PeerServer(msgspec.Struct, frozen=True):
    """What connect gets: where the source listens, and what admits a reader there."""

    host: str
    port: Port
    epoch: Natural
    token: bytes


PEER_SERVER = msgspec.msgpack.Decoder(PeerServer)


class Pair:
    """The target's end of a communicator and its control line. Used from one thread."""

    def __init__(self, kind: GroupKind, host: str, server: PeerServer, memory: "Tensor") -> None:
        """Raises OSError, EOFError, RuntimeError or TransferFailed when the source cannot or will not."""
        self._line = ControlLine.open(server.host, server.port, CONNECT_LIMIT)
        try:
            self._line.send(Hello(server.epoch, server.token))
            welcome = self._line.receive(Welcome)
            if not 0 < welcome.piece_bytes <= MAX_PIECE_BYTES:
                raise TransferFailed(f"the source wants to send {welcome.piece_bytes} bytes at a time")
            self._communicator = Communicator.join(kind, host, server.host, welcome.store_port)
        except BaseException:
            self._line.close()
            raise
        self._buffers = staging(kind, memory, welcome.piece_bytes)

    def read(self, plan: ReadPlan, read: "StagedRead[Tensor]") -> None:
        """Ask for the plan's bytes and feed them to the read, receiving one piece while storing another."""
        self._line.send(Ask.of(plan.remote, plan.lengths))
        self._line.receive(Granted)
        pieces = self._receive(plan.num_bytes)
        wanted = plan.num_bytes > 0
        while wanted:
            wanted = read.take(next(pieces))

    def when_ended(self, tell: Callable[[], object]) -> None:
        """Call tell, from a thread of its own, once either end has closed the pair."""
        self._line.when_ended(tell)

    def close(self) -> None:
        self._communicator.abort()
        self._line.close()

    def _receive(self, num_bytes: int) -> "Iterator[Tensor]":
        sizes = [len(self._buffers[0])] * (num_bytes // len(self._buffers[0]))
        sizes += [rest] if (rest := num_bytes - sum(sizes)) else []
        under_way = None
        for index, size in enumerate(sizes):
            piece = self._buffers[index % 2][:size]
            following = (self._communicator.receive(piece), piece)
            if under_way is not None:
                yield self._arrived(*under_way)
            under_way = following
        if under_way is not None:
            yield self._arrived(*under_way)

    def _arrived(self, work: object, piece: "Tensor") -> "Tensor":
        self._communicator.wait(work)
        return piece


@dataclass(slots=True, eq=False)
class _Peer:
    """Made and posted to by the backend's thread, its reads run in its own, and its pair's end is told by a third."""

    server: PeerServer
    thread: ThreadPoolExecutor
    """Reads of one peer take turns on its pair."""
    pair: "Pair | None" = None
    meeting: "Future[None]" = CONNECTED
    """Of its first pair."""
    reads: "list[StagedRead[Tensor]]" = field(default_factory=list)
    """Those that are not over."""
    ended: bool = False
    """The source has closed its end; the thread may not have noticed."""

    def adopt(self, pair: Pair) -> Pair:
        self.pair = pair
        pair.when_ended(lambda: self._on_end(pair))
        return pair

    def begin(self, read: "StagedRead[Tensor]") -> None:
        self.reads.append(read)
        if self.ended:
            read.fail(_ENDED)

    def close_pair(self) -> None:
        pair, self.pair = self.pair, None
        if pair is not None:
            pair.close()

    def _on_end(self, pair: Pair) -> None:
        if self.pair is pair:
            self.ended = True
            for read in self.reads.copy():
                read.fail(_ENDED)


class TwoSidedBackend:
    """Pairs of gloo or nccl ranks. host is where this machine listens and peers reach it; epoch is the worker's."""

    def __init__(self, kind: GroupKind, host: str, epoch: int) -> None:
        self.name = kind
        self._kind: GroupKind = kind
        self._host = host
        self._admission = Admission(epoch, token_bytes(_TOKEN_BYTES))
        self._peers: dict[str, _Peer] = {}
        self._server: PairServer | None = None

    def register(self, memory: KVMemory) -> None:
        check_available(self._kind, memory)
        self._memory = memory_tensor(memory)
        try:
            self._server = PairServer(self._kind, self._host, self._memory, self._admission)
        except OSError as error:
            raise ConfigError(f"the {self.name} transfer backend cannot listen on {self._host}: {error}") from error
        self._description = PeerServer(self._host, self._server.port, self._admission.epoch, self._admission.token)

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._description)

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        self.disconnect(peer_id)
        peer = self._new_peer(peer_id, unpack(metadata, PEER_SERVER))
        peer.meeting = peer.thread.submit(self._meet, peer)
        return peer.meeting

    def post(self, peer_id: str, plan: ReadPlan) -> "StagedRead[Tensor]":
        peer = self._peers.get(peer_id)
        if peer is None or refused(peer.meeting):
            raise TransferFailed(f"{self.name} is not connected to {peer_id}")
        if not spans_fit(self._memory.numel(), plan.local, plan.lengths):
            raise TransferFailed(f"a span reaches beyond the {self._memory.numel()} bytes of the target memory")
        if peer.ended:
            self.disconnect(peer_id)
            peer = self._new_peer(peer_id, peer.server)
        read = StagedRead(plan, self._store)
        peer.begin(read)
        peer.thread.submit(self._fetch, peer, plan, read)
        return read

    def disconnect(self, peer_id: str) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        # In the peer's thread: a cancelled read may still be on its way out of there.
        peer.thread.submit(peer.close_pair)
        peer.thread.shutdown(wait=False)

    def close(self) -> None:
        for peer_id in list(self._peers):
            self.disconnect(peer_id)
        if self._server is not None:
            self._server.close()

    def _new_peer(self, peer_id: str, server: PeerServer) -> _Peer:
        peer = self._peers[peer_id] = _Peer(server, ThreadPoolExecutor(1, f"kv-{self.name}-read"))
        return peer

    def _meet(self, peer: _Peer) -> None:
        peer.adopt(self._open(peer.server))

    def _open(self, server: PeerServer) -> Pair:
        try:
            return Pair(self._kind, self._host, server, self._memory)
        except (OSError, EOFError, RuntimeError) as error:
            raise TransferFailed(f"no {self.name} pair with {server.host}:{server.port}: {error}") from error

    def _store(self, offset: int, piece: "Tensor") -> None:
        self._memory[offset : offset + len(piece)] = piece

    def _fetch(self, peer: _Peer, plan: ReadPlan, read: "StagedRead[Tensor]") -> None:
        """Runs in the peer's thread until the read is over."""
        if not read.over:
            try:
                (peer.pair or peer.adopt(self._open(peer.server))).read(plan, read)
                finish_copies(self._memory)
                read.finish()
            except Exception as error:  # whatever it was: the read must end
                read.fail(str(error) or type(error).__name__)
            if read.error:
                peer.close_pair()
        peer.reads.remove(read)
