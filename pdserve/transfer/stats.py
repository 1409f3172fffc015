"""What a transfer service has done so far."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.protocols import PullReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """Totals since the service opened; unsettled is the number of pulls now in flight or quarantined.

    bytes_by_backend counts verified bytes. errors_by_code counts pulls whose wait() raised, by
    PdserveError.code. rereads counts second reads after a digest that differed, given_up the reads that another
    backend took over, by backend and code. Seconds as in PullReceipt, of verified pulls.
    """

    pulls: int
    bytes_by_backend: tuple[tuple[str, int], ...]
    errors_by_code: tuple[tuple[str, int], ...]
    rereads: int
    given_up: tuple[tuple[tuple[str, str], int], ...]
    queue_seconds: float
    post_seconds: float
    wire_seconds: float
    verify_seconds: float
    unsettled: int


def total_stats(parts: Sequence[TransferStats]) -> TransferStats:
    """Of several ranks together."""
    bytes_by_backend: Counter[str] = Counter()
    errors_by_code: Counter[str] = Counter()
    given_up: Counter[tuple[str, str]] = Counter()
    for part in parts:
        given_up.update(dict(part.given_up))
        bytes_by_backend.update(dict(part.bytes_by_backend))
        errors_by_code.update(dict(part.errors_by_code))
    return TransferStats(
        pulls=sum(part.pulls for part in parts),
        bytes_by_backend=tuple(sorted(bytes_by_backend.items())),
        errors_by_code=tuple(sorted(errors_by_code.items())),
        rereads=sum(part.rereads for part in parts),
        given_up=tuple(sorted(given_up.items())),
        queue_seconds=sum(part.queue_seconds for part in parts),
        post_seconds=sum(part.post_seconds for part in parts),
        wire_seconds=sum(part.wire_seconds for part in parts),
        verify_seconds=sum(part.verify_seconds for part in parts),
        unsettled=sum(part.unsettled for part in parts),
    )


class StatsCounter:
    """Counts on the event loop's thread."""

    def __init__(self) -> None:
        self.pulls = self.rereads = self.unsettled = 0
        self._queue = self._post = self._wire = self._verify = 0.0
        self._bytes: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._given_up: Counter[tuple[str, str]] = Counter()

    def verified(self, receipt: PullReceipt) -> None:
        self._bytes[receipt.backend] += receipt.num_bytes
        self._queue += receipt.queue_seconds
        self._post += receipt.post_seconds
        self._wire += receipt.wire_seconds
        self._verify += receipt.verify_seconds

    def failed(self, code: str) -> None:
        self._errors[code] += 1

    def given_up(self, backend: str, code: str) -> None:
        self._given_up[backend, code] += 1

    def snapshot(self) -> TransferStats:
        return TransferStats(
            pulls=self.pulls,
            bytes_by_backend=tuple(sorted(self._bytes.items())),
            errors_by_code=tuple(sorted(self._errors.items())),
            rereads=self.rereads,
            given_up=tuple(sorted(self._given_up.items())),
            queue_seconds=self._queue,
            post_seconds=self._post,
            wire_seconds=self._wire,
            verify_seconds=self._verify,
            unsettled=self.unsettled,
        )
