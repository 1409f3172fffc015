"""Named places in an engine's life at which a test makes its process die, freeze or wait, exactly there.

Inert unless a process calls `arm` with a folder. Then reaching point POINT on engine ENGINE looks for the file
FOLDER/ENGINE.POINT, takes it (so that it acts once) and does what it says: `kill` or `stop`, to this process or to the
one whose id follows. Points, in the order in which a request passes them:

    queued         accepted, nothing computed
    leased         ticket issued, prompt not computed
    prefilling     a chunk of the prompt is computed, not the last
    transferring   a pull is about to start
    last_chunk     the whole prompt is computed
    first_token    the first token is known, not sent
    decoding       a later token is known, not sent
    departing      a running sequence may leave, nobody knows yet
    caught_up      its target has what was ready and has not said so
    stopped        it decodes no more, nobody knows yet

and of an engine that is asked for cached KV:

    lending        the blocks asked for are leased, nothing is said yet

A third order, `hold`, is for a point that asks `held`: what is there waits until the process ends.

    landing        reads of a worker in the engine's own process: none is seen to end
"""

import os
import signal
from pathlib import Path

POINTS = (
    "queued",
    "leased",
    "prefilling",
    "transferring",
    "last_chunk",
    "first_token",
    "decoding",
    "departing",
    "caught_up",
    "stopped",
    "lending",
    "landing",
)
ENVIRONMENT = "PDSERVE_FAILPOINTS"
"""Names the folder for engine processes."""

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_armed: tuple[Path, str] | None = None
_held: set[str] = set()


def arm(folder: Path, engine_id: str) -> None:
    """Make this process's points live."""
    global _armed
    _armed = (folder, engine_id)


def reach(point: str) -> None:
    """The process is at a point."""
    if order := _take_order(point):
        blow, _, pid = order.partition(" ")
        os.kill(int(pid) if pid else os.getpid(), _SIGNALS[blow])


def held(point: str) -> bool:
    """Whether what is at a point has to wait there."""
    if _take_order(point) == "hold":
        _held.add(point)
    return point in _held


def _take_order(point: str) -> str:
    """What is to happen at a point, once; empty for nothing."""
    if _armed is None:
        return ""
    folder, engine_id = _armed
    taken = folder / f"{engine_id}.{point}.taken"
    try:
        os.rename(folder / f"{engine_id}.{point}", taken)
    except FileNotFoundError:
        return ""
    return taken.read_text(encoding="utf-8").strip()
