"""Going on with a request elsewhere after an engine or a link was lost: pure rules, and the replays' rate.

Emitted tokens never change. The continuation's prompt is the prompt plus everything emitted; randomness is
keyed by position, so in deterministic mode the client gets exactly the bytes of an undisturbed run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from pdserve.core.clock import Clock
from pdserve.core.cluster import EngineKey, EngineView, Link, Route
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import (
    DigestMismatch,
    EngineDied,
    EngineSilent,
    LinkLost,
    Overloaded,
    PdserveError,
    TransferError,
    TransferFailed,
    TransferTimeout,
    Unavailable,
)
from pdserve.core.request import Request
from pdserve.core.token_delta import TokenDelta

_LINK_ERRORS = (LinkLost, TransferFailed, TransferTimeout)
"""What a decode engine reports when nothing came over the link, whichever end is to blame."""
_LINKS_ENOUGH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRules:
    """max_attempts counts the first one. A request that was on poison_deaths engines as they died is refused; silence
    is no sign of that, for a request that makes a step hang ends its engine's worker, while the engine goes on talking.

    rate (per second) and burst bound all replays of a gateway together, so that a lost engine's requests
    do not crowd out new ones. patience is how long, in seconds, a replay waits for an engine to come back.
    """

    max_attempts: int = 3
    poison_deaths: int = 2
    rate: float = 64.0
    burst: int = 128
    patience: float = 10.0


class Lost(Exception):
    """An attempt lost an incarnation, or the link between two. died: the engine itself is gone.
    link: nothing came over it, and both its ends may be well. damaging: what came over it was damaged."""

    def __init__(
        self,
        error: PdserveError,
        engine: Endpoint,
        *,
        died: bool,
        link: Link | None = None,
        damaging: Link | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.engine = engine
        self.died = died
        self.link = link
        self.damaging = damaging


def lost(error: PdserveError, reporter: Endpoint, route: Route) -> Lost | None:
    """What was lost, or None if another attempt could not help. reporter is the engine whose stream ended
    with the error; a decode engine that reports a failed transfer is itself well."""
    if isinstance(error, TransferError) and reporter == route.decode:
        return Lost(
            error,
            route.prefill,
            died=False,
            link=route.link if isinstance(error, _LINK_ERRORS) else None,
            damaging=route.link if isinstance(error, DigestMismatch) else None,
        )
    if isinstance(error, (EngineDied, TransferError, Unavailable)):
        died = isinstance(error, EngineDied) and not isinstance(error, EngineSilent)
        return Lost(error, reporter, died=died)
    return None


def continuation(request: Request, emitted: Sequence[int], attempt: int) -> Request:
    """The request as attempt number `attempt` (0 is the first) submits it."""
    return continued(request, emitted, f"{request.id}~{attempt}") if attempt else request


def continued(request: Request, emitted: Sequence[int], name: str) -> Request:
    """What is left of a request behind its emitted tokens, as a request of that name."""
    sampling = request.sampling
    return replace(
        request,
        id=name,
        prompt_token_ids=(*request.prompt_token_ids, *emitted),
        sampling=replace(
            sampling,
            max_tokens=sampling.max_tokens - len(emitted),
            min_tokens=max(0, sampling.min_tokens - len(emitted)),
        ),
    )


def rebased(delta: TokenDelta, request_id: str, offset: int) -> TokenDelta:
    """A continuation's delta as part of the whole answer."""
    if not offset and delta.request_id == request_id:
        return delta
    return msgspec.structs.replace(delta, request_id=request_id, index=delta.index + offset)


@dataclass(slots=True)
class ReplayHistory:
    """The losses of one request so far."""

    rules: ReplayRules
    attempts: int = 0
    deaths: int = 0
    error: PdserveError | None = None
    """What the last loss looked like from here."""
    excluded: frozenset[EngineKey] = field(default_factory=frozenset)
    links: tuple[Link, ...] = ()
    """Those that were lost."""
    numerics: str = ""
    """Of the engine that was to decode first: others should round alike."""

    def note(self, loss: Lost) -> None:
        """Count a loss. Raises its error when the request may not be tried again."""
        self.attempts += 1
        self.deaths += loss.died
        self.error = loss.error
        self.excluded |= {(loss.engine.engine_id, loss.engine.epoch)}
        if loss.link:
            self.links += (loss.link,)
        if self.deaths >= self.rules.poison_deaths:
            raise EngineDied(
                f"{self.deaths} engines died while they served this request; it is not tried again"
            ) from loss
        if self.attempts >= self.rules.max_attempts:
            raise loss.error

    def parted(self, engines: Iterable[EngineView]) -> frozenset[EngineKey]:
        """Engines that should take no part in another handoff: the ends of the link that was lost; after a second
        one all of them, because the network between the pools is broken and attempts run out."""
        if len(self.links) >= _LINKS_ENOUGH:
            return frozenset(view.key for view in engines)
        return frozenset(end for link in self.links for end in link)


class ReplayBudget:
    """A token bucket over all replays of one gateway."""

    def __init__(self, rules: ReplayRules, clock: Clock) -> None:
        self._rules = rules
        self._clock = clock
        self._tokens = float(rules.burst)
        self._refilled = clock.monotonic()

    async def admit(self) -> None:
        """Wait for this replay's turn. Raises Overloaded when that is further away than patience."""
        now = self._clock.monotonic()
        self._tokens = min(self._rules.burst, self._tokens + (now - self._refilled) * self._rules.rate)
        self._refilled = now
        self._tokens -= 1
        wait = max(0.0, -self._tokens) / self._rules.rate
        if wait > self._rules.patience:
            self._tokens += 1
            raise Overloaded("too many requests lost their engines at once; try again", retry_after=wait)
        if wait:
            await self._clock.sleep(wait)
