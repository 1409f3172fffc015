"""Tells whoever looks at a pool with kubectl what was decided about it: a Kubernetes Event for each decision."""

import asyncio
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from pdserve.cluster.k8s.target import Held, Target
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Role
from pdserve.core.errors import PdserveError
from pdserve.scaler.decision import Decision, FlipRole, Scale, SetBypass
from pdserve.scaler.explain import in_words

if TYPE_CHECKING:
    from pdserve.cluster.k8s.client import KubeClient

_EVERY = 1.0
"""Seconds between two Events."""
_MOST_WAITING = 16
_MOST_TEXT = 1000
"""Characters; the API server takes 1024."""
_REPEATED = 60.0
"""Seconds in which the same is not told again, such as what fails again and again."""
_COMPONENT = "pdserve-scaler"

_log = structlog.get_logger(__name__)


class Announcer:
    """Writes one Event a second at most, and the same of a pool once a minute. Of more than wait, the oldest are left
    out, and the next says so."""

    def __init__(self, client: "KubeClient", targets: Mapping[Role, Target], identity: str, clock: Clock) -> None:
        self._client = client
        self._targets = targets
        self._identity = identity
        self._clock = clock
        self._waiting: deque[dict[str, Any]] = deque()
        self._left_out = 0
        self._told: dict[Role, tuple[str, float]] = {}
        """What was last told of a pool, and when."""
        self._some = asyncio.Event()
        self._trouble = ""

    def offer(self, decision: Decision, failure: PdserveError | None, held: Mapping[Role, Held]) -> None:
        role = _role(decision)
        target = self._targets.get(role)
        if target is None:
            return
        now, said = self._clock.monotonic(), f"{in_words(decision)} {failure.code if failure else ''}"
        before, when = self._told.get(role, ("", 0.0))
        if said == before and now < when + _REPEATED:
            return
        self._told[role] = said, now
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            self._left_out += 1
        self._waiting.append(self._event(decision, failure, target, held[role].uid if role in held else ""))
        self._some.set()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                event = self._waiting.popleft()
                if left_out := self._left_out:
                    event["message"] = f"({left_out} earlier ones left out) {event['message']}"[:_MOST_TEXT]
                    self._left_out = 0
                await self._write(event)
                await self._clock.sleep(_EVERY)

    def _event(self, decision: Decision, failure: PdserveError | None, target: Target, uid: str) -> dict[str, Any]:
        at = datetime.fromtimestamp(self._clock.unix(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        about = {"apiVersion": "/".join(target.group_version), "kind": target.kind, "name": target.name}
        return {
            "metadata": {"generateName": f"{_COMPONENT}."},
            "involvedObject": {**about, "namespace": self._client.namespace, "uid": uid},
            "type": "Warning" if failure else "Normal",
            "reason": "ScalingFailed" if failure else _reason(decision),
            "message": _message(decision, failure)[:_MOST_TEXT],
            "source": {"component": _COMPONENT},
            "reportingComponent": _COMPONENT,
            "reportingInstance": self._identity,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }

    async def _write(self, event: dict[str, Any]) -> None:
        try:
            await self._client.create_event(event)
        except PdserveError as error:
            if str(error) != self._trouble:
                _log.error("decisions are not told as Events", code=error.code, cause=str(error))
            self._trouble = str(error)
        else:
            self._trouble = ""


def _role(decision: Decision) -> Role:
    match decision.action:
        case Scale(role=role) | FlipRole(role=role):
            return role
        case SetBypass():
            return Role.PREFILL


def _reason(decision: Decision) -> str:
    match decision.action:
        case Scale(engines=engines, before=before):
            return "ScaledUp" if engines > before else "ScaledDown"
        case FlipRole():
            return "RoleFlipped"
        case SetBypass():
            return "BypassChanged"


def _message(decision: Decision, failure: PdserveError | None) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in decision.inputs.items())
    cause = f" failed: {failure}" if failure else ""
    return f"{in_words(decision)}{cause}; {decision.rule}: {decision.reason} ({figures})"
