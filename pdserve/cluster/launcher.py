"""The seam between the supervisor and whatever starts processes. Held to tests/contract/test_launchers.py."""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a process takes of the machine it is placed on.

    gpus may be a fraction, for several processes on one GPU; None is a fair share of what is there.
    custom are a cluster's own names, as its nodes offer them.
    """

    cpus: float = 1.0
    gpus: float | None = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One process to start.

    name is for people and logs ("prefill-0"). module is run as a program; payload, a JSON object, is
    what it is told. threads bounds its compute threads. resources place it on a cluster; without them
    it runs on the launcher's own machine. The child's side is `pdserve.launch.child`.

    followers are processes that share its fate, each placed on a machine of its own where there are several.
    They have none themselves, and without resources of their own take what their leader takes. The leader
    inherits a listening TCP socket, its descriptor told as `door` in its payload. A follower is started once
    the leader's process exists and is told the socket's host:port as `leader`; its connection waits in the
    backlog. It reports ready for itself, and nobody waits for that.
    """

    name: str
    module: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    resources: Resources | None = None
    followers: tuple["LaunchSpec", ...] = ()


class Launched(Protocol):
    """One incarnation of a process and of its followers. It dies with the process that launched it.

    pid, the answer and the exit code are the leader's. When one of them ends, all end: by themselves
    within a few seconds, or killed.
    """

    @property
    def pid(self) -> int:
        """On the machine it runs on."""
        ...

    def ready(self) -> Awaitable[dict[str, Any]]:
        """What the process reported once it could serve; has no deadline of its own.

        Raises the error the process reported instead (ConfigError, CheckpointError, …), or EngineDied
        with the last lines of its log when it ended without a word. A follower that failed before the
        leader was ready is told the same way, by its name."""
        ...

    def ended(self) -> Awaitable[int]:
        """The exit code, negative for a signal; afterwards the process is gone, memory included, and its followers.

        A process whose machine is lost counts as killed: nobody can reach it, but it may run on for as
        long as its machine does, and only its epoch keeps it from being believed."""
        ...

    def terminate(self) -> None:
        """Ask it to drain and end; it lets its followers go. Does nothing when it has ended."""
        ...

    def kill(self) -> None:
        """End it, its workers and its followers at once; one that fails of that itself counts as killed. Does nothing
        when it has ended."""
        ...


class Launcher(Protocol):
    """Starts processes. Cancelling a launch leaves nothing behind."""

    def launch(self, spec: LaunchSpec) -> Awaitable[Launched]:
        """Raises OSError or a PdserveError when the process cannot be started; waits, without a deadline,
        until there is room for it and all its followers."""
        ...
