"""The latest requests, so that one can be asked for after the fact. Bounded; the oldest goes first."""

from collections import OrderedDict
from itertools import islice

from pdserve.telemetry.record import RequestRecord

LAST = "last"


class RequestRing:
    """Records by any name somebody may know: the id in a response's body, its x-request-id, the client's own id."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()
        self._names: dict[str, str] = {}
        """Other name → request id; of equal names the latest counts."""

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: RequestRecord) -> None:
        """Keep a record, running or not; what happens to it later is seen too."""
        self._records[record.request_id] = record
        for name in _names(record):
            self._names[name] = record.request_id
        while len(self._records) > self._capacity:
            self._forget(self._records.popitem(last=False)[1])

    def find(self, name: str) -> RequestRecord | None:
        """The record of that name; "last" is the one that arrived last."""
        if name == LAST:
            return next(reversed(self._records.values()), None)
        return self._records.get(self._names.get(name, name))

    def latest(self, count: int) -> list[RequestRecord]:
        """At most so many, in order of arrival."""
        return list(reversed(list(islice(reversed(self._records.values()), count))))

    def _forget(self, record: RequestRecord) -> None:
        for name in _names(record):
            if self._names.get(name) == record.request_id:
                del self._names[name]


def _names(record: RequestRecord) -> tuple[str, ...]:
    """Besides its id: the id without the endpoint's prefix, and the client's."""
    bare = record.request_id.rpartition("-")[2]
    return tuple(name for name in (bare, record.client_id) if name)
