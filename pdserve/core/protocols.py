"""The seams between layers. Implementations are held to one contract suite each (tests/contract/)."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pdserve.core.batch import Batch, StepOutput
from pdserve.core.endpoint import LoadSnapshot
from pdserve.core.layout import KVLayout
from pdserve.core.pair_check import MachineFacts, WireBytes
from pdserve.core.request import Request
from pdserve.core.shards import KVPart, KVShard
from pdserve.core.ticket import Departure, KVSource, TransferTicket

if TYPE_CHECKING:
    from pdserve.core.token_delta import TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the torch-free part of an engine must know of its model."""

    name: str
    revision: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    numerics: str = ""
    """Names what decides how results round, where equal requests are promised equal bits; empty where they are not."""


class StepHandle(Protocol):
    """A step in flight; opaque to the engine."""

    @property
    def step(self) -> int: ...


class Executor(Protocol):
    """Runs batches in submission order, at most two in flight.

    forward enqueues a step and returns at once; sample enqueues the choice of tokens for it (masks is
    the seam for grammars: one optional allowed-token bitmask per sampled row); collect waits for the
    tokens. A row with token source PREVIOUS_STEP reads what the step before sampled for it.
    collect raises EngineDied when the worker is gone.
    """

    def forward(self, batch: Batch) -> StepHandle: ...

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None: ...

    def collect(self, handle: StepHandle) -> Awaitable[StepOutput]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAddress:
    """One rank of an engine: what it holds, and per backend name, opaque metadata with which to read it."""

    shard: KVShard
    backends: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """What an engine's workers must know of another engine to read its KV."""

    engine_id: str
    epoch: int
    layout_hash: bytes
    ranks: tuple[RankAddress, ...]

    @property
    def shards(self) -> tuple[KVShard, ...]:
        return tuple(rank.shard for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSpec:
    """One verified read of blocks from a peer; the two block lists pair up in order.

    deadline and start_within are in seconds from the call: when it fails, and how long its reads may start, including
    those after damage or over another backend. seed binds the digest to its ticket and place. part says which heads,
    and between which ranks; None is whole blocks between two engines of one rank each.
    """

    peer: str
    epoch: int
    source_blocks: tuple[int, ...]
    target_blocks: tuple[int, ...]
    digest: bytes
    seed: int
    deadline: float
    start_within: float
    part: KVPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReceipt:
    """A pull that completed and verified.

    backend brought the bytes; failovers are the (backend, error code) that were given up before it. Seconds by stage,
    re-reads included: queue until the backend's thread was free, post in the call that started the read (which does
    it all where the kernel copies), wire until the bytes were there, verify for the digest.
    """

    backend: str
    num_bytes: int
    wire_seconds: float
    verify_seconds: float
    queue_seconds: float = 0.0
    post_seconds: float = 0.0
    failovers: tuple[tuple[str, str], ...] = ()

    @property
    def seconds(self) -> float:
        """What this pull took by itself, without its turn."""
        return self.post_seconds + self.wire_seconds + self.verify_seconds


class Pull(Protocol):
    """A pull under way.

    wait returns the receipt, or raises a TransferError: TransferTimeout at the deadline, TransferFailed,
    DigestMismatch, or TransferFailed after cancel(); or EngineDied because our own worker is gone. Whatever
    wait did, the target blocks may still be written until settled() returns; settled never raises and may take
    as long as the peer lives.
    """

    def wait(self) -> Awaitable[PullReceipt]: ...

    def settled(self) -> Awaitable[None]: ...

    def cancel(self) -> None: ...


class TransferService(Protocol):
    """The component of a worker that owns its KV memory and moves blocks, of all its ranks together."""

    @property
    def layout(self) -> KVLayout:
        """Of the engine; its ranks hold the heads their shards name."""
        ...

    @property
    def address(self) -> PeerAddress: ...

    def connect(self, peer: PeerAddress) -> Awaitable[str]:
        """Make a peer readable; returns the chosen backend's name.

        A second call with another epoch replaces the first once that is readable; one with the same epoch ends no
        pull. Raises LayoutMismatch, TransferFailed, or EngineDied because our own worker is gone."""
        ...

    def disconnect(self, engine_id: str) -> Awaitable[None]: ...

    def digest(
        self, blocks: tuple[int, ...], num_tokens: int, seed: int, part: KVPart | None = None
    ) -> Awaitable[bytes]:
        """Zero the unused slots of the last block, then digest the blocks' bytes in order.

        num_tokens is the number of tokens the blocks hold together. The caller has collected every step that wrote
        them. part limits the digest to the heads one of our ranks is read for; None is whole blocks of a sole rank."""
        ...

    def pull(self, spec: PullSpec) -> Pull: ...


class CheckedTransfer(TransferService, Protocol):
    """A transfer service whose ways to others can be checked."""

    def fill(self, blocks: tuple[int, ...], seed: int) -> Awaitable[None]:
        """Overwrite blocks, which are the caller's alone, with bytes drawn by seed."""
        ...

    def facts(self) -> Awaitable[MachineFacts]: ...

    def wire_bytes(self) -> Awaitable[WireBytes]: ...


class DeltaStream(Protocol):
    """What an engine produces for one request, in order; the last delta has a finish_reason.

    Iterating raises EngineDied when the engine is gone. aclose cancels whatever has not ended."""

    @property
    def ended_at(self) -> float | None:
        """When (event-loop seconds) the last delta arrived, read or not."""
        ...

    def __aiter__(self) -> "AsyncIterator[TokenDelta | TransferTicket]": ...

    def __anext__(self) -> "Awaitable[TokenDelta | TransferTicket]": ...

    def conclude(self) -> "Awaitable[TokenDelta | None]":
        """Cancel what has not ended, and skip to the last delta, for its trace. None when that was read before, or does
        not come soon. Never raises."""
        ...

    def aclose(self) -> Awaitable[None]: ...


class EngineClient(Protocol):
    """An engine as dispatch sees it. Implementations: gRPC session, in-process, simulated."""

    def submit(
        self,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> DeltaStream:
        """Send the request now and stream its deltas.

        handoff: prefill only; the first item is the TransferTicket, then one delta with the first
        token, its finish_reason HANDOFF unless the request ended there. ticket: continue from another
        engine's prefill, deltas start at index 1; or from another engine's Departure, deltas start behind the
        tokens that one sampled. source: where KV of the prompt's beginning should be. A refused request streams one
        delta with finish_reason ERROR."""
        ...

    def depart(self, request_id: str) -> Awaitable[Departure]:
        """Ask a request that decodes there to move. It goes on until whoever presents the ticket has caught up; then
        its stream ends with HANDOFF. Raises Unavailable when it has ended, EngineDied."""
        ...

    def snapshot(self) -> LoadSnapshot | None: ...
