"""KV memory as a gRPC byte stream: the last resort, which works wherever two engines can talk at all.

The source serves spans of its registered memory; gRPC's flow control holds it back to what the target
takes. Every read carries the epoch and a token out of the source's metadata, so that neither another
incarnation nor a stranger is served. Bytes are copied several times on the way.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hmac import compare_digest
from secrets import token_bytes

import msgspec
import numpy as np

from pdserve.core.errors import ConfigError, StaleEpoch, TransferFailed
from pdserve.core.msgpack import Natural, unpack
from pdserve.rpc.byte_stream import SpanReader, SpanServer
from pdserve.rpc.generated.pdserve.v1 import kv_pb2 as pb
from pdserve.transfer.base import CONNECTED, ReadPlan, refused
from pdserve.transfer.memory import KVMemory
from pdserve.transfer.spans import read_pieces, spans_fit
from pdserve.transfer.staged import StagedRead

PIECE_BYTES = 1 << 20
READ_LIMIT = 60.0
"""Seconds after which a read ends whoever waits for it; a pull's own deadline cancels it long before."""

CONNECT_LIMIT = 3.0
"""Seconds a peer may take to answer an empty read."""

_TOKEN_BYTES = 16


class PeerServer(msgspec.Struct, frozen=True):
    """What connect gets: where the source listens, and what admits a reader there."""

    address: str
    epoch: Natural
    token: bytes

    def request(self, offsets: list[int], lengths: list[int]) -> pb.ReadSpans:
        return pb.ReadSpans(source_epoch=self.epoch, token=self.token, offsets=offsets, lengths=lengths)


PEER_SERVER = msgspec.msgpack.Decoder(PeerServer)


@dataclass(slots=True)
class _Peer:
    server: PeerServer
    reader: SpanReader
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "kv-grpc-read"))
    """Reads of one peer take turns: they would share one connection anyway."""
    greeting: "Future[None]" = CONNECTED

    def close(self) -> None:
        self.reader.close()
        self.thread.shutdown(wait=False, cancel_futures=True)


class GrpcStreamBackend:
    """host is where this machine listens and peers reach it; epoch is the worker's own."""

    name = "grpc"

    def __init__(self, host: str, epoch: int) -> None:
        self._host, self._epoch = host, epoch
        self._token = token_bytes(_TOKEN_BYTES)
        self._peers: dict[str, _Peer] = {}
        self._server: SpanServer | None = None

    def register(self, memory: KVMemory) -> None:
        self._memory = memory
        try:
            self._server = SpanServer(self._host, self._serve)
        except RuntimeError as error:
            raise ConfigError(f"the grpc transfer backend cannot listen on {self._host}: {error}") from error
        self._address = f"{self._host}:{self._server.port}"

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(PeerServer(self._address, self._epoch, self._token))

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        self.disconnect(peer_id)
        server = unpack(metadata, PEER_SERVER)
        peer = self._peers[peer_id] = _Peer(server, SpanReader(server.address))
        peer.greeting = peer.thread.submit(_greet, peer)
        return peer.greeting

    def post(self, peer_id: str, plan: ReadPlan) -> "StagedRead[np.ndarray]":
        peer = self._peers.get(peer_id)
        if peer is None or refused(peer.greeting):
            raise TransferFailed(f"gRPC is not connected to {peer_id}")
        if not spans_fit(self._memory.nbytes, plan.local, plan.lengths):
            raise TransferFailed(f"a span reaches beyond the {self._memory.nbytes} bytes of the target memory")
        read = StagedRead(plan, self._memory.write)
        peer.thread.submit(_fetch, peer, plan, read)
        return read

    def disconnect(self, peer_id: str) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            peer.close()

    def close(self) -> None:
        for peer_id in list(self._peers):
            self.disconnect(peer_id)
        if self._server is not None:
            self._server.close()

    def _serve(self, request: pb.ReadSpans) -> Iterator[bytes]:
        """The bytes a peer asks for. Raises StaleEpoch or TransferFailed, before the first of them."""
        if request.source_epoch != self._epoch or not compare_digest(request.token, self._token):
            raise StaleEpoch("this is another incarnation than the reader shook hands with")
        offsets = np.array(request.offsets, dtype=np.uint64)
        lengths = np.array(request.lengths, dtype=np.uint64)
        if not spans_fit(self._memory.nbytes, offsets, lengths):
            raise TransferFailed(f"the spans asked for do not lie in {self._memory.nbytes} bytes of KV memory")
        yield from read_pieces(self._memory, offsets, lengths, PIECE_BYTES)


def _greet(peer: _Peer) -> None:
    """By a read of nothing. Raises TransferFailed when the peer does not know this reader, or does not answer."""
    for _ in peer.reader.read(peer.server.request([], []), CONNECT_LIMIT):
        raise TransferFailed("the peer sent bytes nobody asked for")


def _fetch(peer: _Peer, plan: ReadPlan, read: "StagedRead[np.ndarray]") -> None:
    """Runs in the peer's thread until the read is over."""
    if read.over:
        return
    try:
        call = peer.reader.read(peer.server.request(plan.remote.tolist(), plan.lengths.tolist()), READ_LIMIT)
        read.on_cancel(call.cancel)
        for data in call:
            if not read.take(np.frombuffer(data, dtype=np.uint8)):
                call.cancel()
                break
        read.finish()
    except Exception as error:  # whatever it was: the read must end
        read.fail(str(error) or type(error).__name__)
