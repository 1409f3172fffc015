"""An engine's line to one incarnation of another whose KV it reads, as the reader sees it."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Protocol

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import PdserveError
from pdserve.core.shards import KVShard
from pdserve.core.ticket import TransferTicket
from pdserve.engine.handoff_source import Deliver, Parts


class SourceName(Protocol):
    """Whatever names an incarnation that KV can be read from: a ticket, or a hint."""

    @property
    def engine_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...

    @property
    def address(self) -> str:
        """host:port of its gRPC server."""
        ...


class SourceLink(Protocol):
    """Keeps leases alive and carries news. Fails as a whole: `error` is then set, for good.

    Implementations: gRPC (handoff_link), simulated.
    """

    @property
    def engine_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...

    @property
    def error(self) -> PdserveError | None: ...

    @property
    def backend(self) -> str:
        """Name of the transfer backend, once ready."""
        ...

    @property
    def shards(self) -> tuple[KVShard, ...]:
        """What the source's ranks hold, once ready."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether pulls may start at once."""
        ...

    def start(self) -> None:
        """Begin to open; never raises."""
        ...

    def ready(self) -> Awaitable[None]:
        """Wait until pulls may start. Raises what made the link fail."""
        ...

    def distrust(self) -> None:
        """A read failed although the link holds: connect for transfers again before the next fetch."""
        ...

    def hold(self, ticket: TransferTicket) -> None:
        """Renew the ticket's lease until released."""
        ...

    def attach(
        self, ticket_id: str, first_block: int, deliver: Deliver, parts: Parts = (None,), *, bulk: bool = False
    ) -> None:
        """Ask for the parts of the regions from first_block on, with bulk only when the prompt is complete."""
        ...

    def borrow(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts = (None,)) -> None:
        """Ask for a lease of the longest cached run of these blocks, under a new ticket id, and for the parts of its
        regions; the lease is renewed until released."""
        ...

    def caught_up(self, ticket_id: str) -> None:
        """Tell the source of a running sequence that it may stop: all that was ready is here."""
        ...

    def lease_left(self, ticket_id: str) -> float:
        """Seconds in which reads may still start; none from 0 down."""
        ...

    def release(self, ticket_id: str) -> Awaitable[None]:
        """Tell the source we are done. Raises LeaseExpired if what was read must be discarded."""
        ...

    def give_up(self, ticket_id: str) -> None:
        """Release without waiting for the answer; for KV nobody wants any more."""
        ...

    def close(self) -> Coroutine[None, None, None]:
        """Fail whatever still waits on it, and give up what it holds."""
        ...


OpenLink = Callable[[SourceName, Callable[[PdserveError], None]], SourceLink]
"""Makes the link to a source. The callback is told once when the link fails."""
