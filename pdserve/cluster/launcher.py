"""The seam between the supervisor and whatever starts processes. Held to tests/contract/test_launchers.py."""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One process to start.

    name is for people and logs ("prefill-0"). module is run as a program; payload, a JSON object, is
    what it is told. threads bounds its compute threads. The child's side is `pdserve.launch.child`.
    """

    name: str
    module: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1


class Launched(Protocol):
    """One incarnation of a process. It dies with the process that launched it."""

    @property
    def pid(self) -> int: ...

    def ready(self) -> Awaitable[dict[str, Any]]:
        """What the process reported once it could serve; has no deadline of its own.

        Raises the error the process reported instead (ConfigError, CheckpointError, …), or EngineDied
        with the last lines of its log when it ended without a word."""
        ...

    def ended(self) -> Awaitable[int]:
        """The exit code, negative for a signal; afterwards the process is gone, memory included."""
        ...

    def terminate(self) -> None:
        """Ask it to drain and end. Does nothing when it has ended."""
        ...

    def kill(self) -> None:
        """End it and its workers at once. Does nothing when it has ended."""
        ...


class Launcher(Protocol):
    """Starts processes. Cancelling a launch leaves nothing behind."""

    def launch(self, spec: LaunchSpec) -> Awaitable[Launched]: ...
