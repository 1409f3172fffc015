"""Who of several scalers acts: the one that holds a Lease (coordination.k8s.io/v1). Pure.

As in client-go's leader election: nobody compares clocks. A Lease has ended when this process has seen it unchanged for
as long as it says; so a leader that renews in time is never overtaken, whatever the hour is on its machine.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A Lease as it was last read. at: when it was first seen so, monotonic seconds."""

    body: dict[str, Any]
    at: float

    @property
    def version(self) -> str:
        return str(self.body["metadata"].get("resourceVersion", ""))

    @property
    def holder(self) -> str:
        return self.body.get("spec", {}).get("holderIdentity") or ""

    @property
    def ends(self) -> float:
        return self.at + float(self.body.get("spec", {}).get("leaseDurationSeconds") or 0)

    def free_for(self, identity: str, now: float) -> bool:
        return self.holder in ("", identity) or now >= self.ends


def seen(before: Seen | None, body: dict[str, Any], now: float) -> Seen:
    """A Lease that was read, or written, just now."""
    after = Seen(body=body, at=now)
    return before if before is not None and before.version == after.version else after


def claim(before: Seen | None, name: str, identity: str, seconds: int, unix: float) -> dict[str, Any]:
    """The Lease as identity would hold it from now on."""
    moment = _micro_time(unix)
    spec = dict(before.body.get("spec", {})) if before else {}
    if before is None or before.holder != identity:
        spec |= {"acquireTime": moment, "leaseTransitions": spec.get("leaseTransitions", 0) + (before is not None)}
    spec |= {"holderIdentity": identity, "leaseDurationSeconds": seconds, "renewTime": moment}
    return _lease(before, name, spec)


def release(before: Seen, name: str, unix: float) -> dict[str, Any]:
    """The Lease as nobody's."""
    moment = _micro_time(unix)
    spec = {**before.body.get("spec", {}), "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": moment}
    return _lease(before, name, spec)


def _lease(before: Seen | None, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = before.body["metadata"] if before else {"name": name}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


def _micro_time(unix: float) -> str:
    """RFC 3339 with six digits, which the API server insists on."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
