"""What the supervisor keeps running, and what it knows of each."""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.core.endpoint import Endpoint, EngineState, Role


class Phase(StrEnum):
    """Life of a member.

    DOWN → STARTING → READY ⇄ SUSPECT → KILLED → DOWN → …   (a process that ends is DOWN at once)
              any of them → DRAINING → STOPPED               (on shutdown, and when asked to)
                               DRAINING → DOWN → …            (when it is to return)
                                          STOPPED → DOWN → …  (when asked to)
    """

    DOWN = "down"
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    KILLED = "killed"
    DRAINING = "draining"
    STOPPED = "stopped"


_STATES = {
    Phase.DOWN: EngineState.DEAD,
    Phase.STARTING: EngineState.STARTING,
    Phase.READY: EngineState.READY,
    Phase.SUSPECT: EngineState.SUSPECT,
    Phase.KILLED: EngineState.DEAD,
    Phase.DRAINING: EngineState.DRAINING,
    Phase.STOPPED: EngineState.DEAD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One engine (role set) or gateway (role None) that should be running.

    Times are monotonic seconds. since is when the phase began; last_heard when the incarnation last
    gave a sign of life; due when a member that is DOWN is to be started. deaths are in a row.
    ever_ready tells an incarnation that broke from a member that never worked. returns: a draining one is started
    again once it has ended. joined: the others were there before it and go on without it.
    """

    id: str
    role: Role | None
    phase: Phase = Phase.DOWN
    epoch: int = 0
    pid: int = 0
    address: str = ""
    since: float = 0.0
    ready_since: float | None = None
    last_heard: float = 0.0
    due: float = 0.0
    deaths: int = 0
    ever_ready: bool = False
    returns: bool = False
    joined: bool = False

    def endpoint(self) -> Endpoint | None:
        """How gateways see it; None for a gateway and for an engine that was never started."""
        if self.role is None or not self.epoch:
            return None
        return Endpoint(
            engine_id=self.id,
            role=self.role,
            epoch=self.epoch,
            address=self.address,
            pid=self.pid,
            state=_STATES[self.phase],
        )
