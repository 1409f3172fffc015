"""What a gateway knows of one engine incarnation: its reports, and the load this gateway has booked on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp

from pdserve.core.blocks import KVEvent, KVSnapshot
from pdserve.core.clock import Clock
from pdserve.core.cluster import (
    RECENT_SECONDS,
    Booked,
    BookedDecode,
    BookedPrompt,
    EngineKey,
    EngineView,
    Reservation,
    Share,
    StepModel,
    expected_output,
)
from pdserve.core.endpoint import Endpoint, EngineCapacity, EngineState, LoadSnapshot
from pdserve.dispatch.fetch_speeds import NO_SPEEDS
from pdserve.dispatch.other_bookings import OtherBookings
from pdserve.router.calibration import StepCalibrator
from pdserve.router.kv_index import KVIndex
from pdserve.router.load import PromptWork, prompt_seconds
from pdserve.router.pool_model import PoolModel
from pdserve.router.rebalancing import DecodingRequest

_ON_THE_WAY = 0.02
"""Seconds before a snapshot's arrival in which a request may have been dispatched without being counted."""
_VIEW_LIFE = 1.0
"""Seconds after which a view is made anew though nothing happened, for what fades in it."""


class EngineLedger:
    """Fed by the engine's connection with what the engine sends, by the pool with bookings.

    Bookings never wait for a snapshot, and a snapshot does not undo what it cannot have counted yet.
    """

    def __init__(
        self,
        key: EngineKey,
        index: KVIndex,
        clock: Clock,
        pool: PoolModel[EngineKey],
        prior: StepModel | None = None,
        filled: float = 0.0,
        on_load: Callable[[], None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
        on_booked: Callable[[str], None] = lambda request_id: None,
    ) -> None:
        """pool: shared by the ledgers of the engine's peers. filled: share of its KV that counts as filled from the
        beginning. on_load: called after each snapshot; on_change whenever the next view will differ; on_booked when
        this gateway's booking of a request has changed."""
        self._key = key
        self._pool = pool
        self._on_load = on_load
        self._on_change = on_change
        self._on_booked = on_booked
        self._elsewhere = OtherBookings()
        self._index = index
        self._clock = clock
        self._calibrator = StepCalibrator(prior)
        pool.add(key, self._calibrator)
        self._filled = filled
        self._capacity: EngineCapacity | None = None
        self._load: LoadSnapshot | None = None
        self._load_at = 0.0
        self._others = 0
        self._prompts: dict[str, BookedPrompt] = {}
        """By request, until its first token; the oldest first."""
        self._decoding: dict[str, Reservation] = {}
        self._rows: dict[str, BookedDecode] = {}
        """What is still expected of those in _decoding."""
        self._written: dict[str, int] = {}
        """Request that decodes here, or did and may again → tokens of its answer that have come."""
        self._reserved = 0
        self._recent = PromptWork(), 0.0
        self._view: EngineView | None = None
        self._view_until = 0.0
        self._view_version = 0
        self._left = False

    @property
    def step_model(self) -> StepModel | None:
        """What the engine's own steps suggest. None before it has taken one."""
        return self._calibrator.model if self._calibrator.calibrated else None

    @property
    def numerics(self) -> str:
        """As in EngineCapacity; empty, too, until it has told."""
        return self._capacity.numerics if self._capacity else ""

    @property
    def domain(self) -> str:
        """The same of its domain."""
        return self._capacity.domain if self._capacity else ""

    @property
    def kv_filled(self) -> float:
        """As in EngineView."""
        blocks = self._capacity.num_blocks if self._capacity else 0
        held = min(1.0, self._index.held_by(self._key) / blocks) if blocks else 0.0
        return max(held, self._filled)

    def described(self, capacity: EngineCapacity) -> None:
        self._capacity = capacity
        self._outdate()

    def loaded(self, load: LoadSnapshot) -> None:
        now = self._clock.monotonic()
        self._calibrator.update(load.steps)
        self._pool.refresh(now)
        self._load, self._load_at = load, now
        known = len(self._decoding.keys() | self._prompts.keys()) + len(self._elsewhere)
        self._others = max(0, load.running + load.waiting - known)
        self._outdate()
        self._on_load()

    def kv_changed(self, events: Sequence[KVEvent]) -> bool:
        """False: events are missing, ask the engine for those that follow kv_number."""
        return self._left or self._index.apply(self._key, events)

    @property
    def kv_number(self) -> int | None:
        """Of the last event that was taken in; None: everything is missing."""
        return self._index.last_number(self._key)

    def kv_restored(self, snapshot: KVSnapshot) -> None:
        if not self._left:
            self._index.restore(self._key, snapshot)

    def tokens_arrived(self, request_id: str, count: int) -> None:
        """The request's prompt is computed, and the engine has sent so many tokens more."""
        if self._prompts.pop(request_id, None):
            self._outdate()
            self._on_booked(request_id)
        if request_id in self._written:
            self._written[request_id] += count
            if request_id in self._rows and (row := self._row(request_id)) != self._rows[request_id]:
                self._rows[request_id] = row
                self._outdate()

    def book(self, reservation: Reservation) -> None:
        """Both shares of the request that fall to this engine."""
        if reservation.prefill == self._key:
            self._book_prompt(reservation)
        if reservation.decode == self._key:
            self.book_decode(reservation)
        self._outdate()
        self._on_booked(reservation.request_id)

    def book_decode(self, reservation: Reservation) -> None:
        self._decoding[reservation.request_id] = reservation
        self._written.setdefault(reservation.request_id, 0)
        self._rows[reservation.request_id] = self._row(reservation.request_id)
        self._reserved += _reserved_by(reservation)
        self._outdate()
        self._on_booked(reservation.request_id)

    def release(self, request_id: str) -> None:
        """Whatever is still booked for the request here."""
        self._prompts.pop(request_id, None)
        self.suspend_decode(request_id)
        self._written.pop(request_id, None)

    def suspend_decode(self, request_id: str) -> None:
        """The request's load counts elsewhere, but what it writes here is counted on until it is released: it may be
        booked here again."""
        reservation = self._decoding.pop(request_id, None)
        if reservation is not None:
            self._reserved -= _reserved_by(reservation)
            del self._rows[request_id]
        self._outdate()
        self._on_booked(request_id)

    def share(self, request_id: str) -> Share | None:
        """What of a request of this gateway is booked here."""
        prompt, decoding = self._prompts.get(request_id), self._decoding.get(request_id)
        if prompt is None and decoding is None:
            return None
        uncached = prompt.tokens if prompt else 0
        if decoding is None:
            return Share(uncached, 0, 0)
        return Share(uncached, decoding.prompt_tokens, max(0, decoding.max_tokens - self._written[request_id]))

    def shares(self) -> dict[str, Share]:
        """Of all requests of this gateway that are booked here."""
        booked = self._prompts.keys() | self._decoding.keys()
        return {request_id: share for request_id in booked if (share := self.share(request_id))}

    def others_booked(self, router: str, request_id: str, share: Share | None) -> None:
        """Another router's booking of a request here is now this."""
        self._elsewhere.change(router, request_id, share, self._clock.monotonic())
        self._outdate()

    def others_hold(self, router: str, shares: Mapping[str, Share]) -> None:
        """All that another router has booked here."""
        if self._elsewhere.replace(router, shares, self._clock.monotonic()):
            self._outdate()

    def decoding(self, request_id: str) -> DecodingRequest | None:
        """The request, if it is booked to decode here."""
        booked = self._decoding.get(request_id)
        if booked is None:
            return None
        longest = booked.prompt_tokens + booked.max_tokens
        return DecodingRequest(request_id, self._key, self._rows[request_id], self._written[request_id], longest)

    def join(self, pool: PoolModel[EngineKey]) -> None:
        """The engine has other peers now."""
        self._pool.forget(self._key)
        self._pool = pool
        pool.add(self._key, self._calibrator)
        self._outdate()

    def forget(self) -> None:
        """The incarnation has left. What its connection reads before it is closed is not noted any more."""
        self._left = True
        self._index.drop(self._key)
        self._pool.forget(self._key)

    def view(
        self,
        endpoint: Endpoint,
        now: float,
        *,
        usable: bool,
        lost_links: frozenset[EngineKey] = frozenset(),
        fetch_speeds: Mapping[EngineKey, float] = NO_SPEEDS,
        handoff_speeds: Mapping[EngineKey, float] = NO_SPEEDS,
    ) -> EngineView:
        """The engine for a routing decision; an engine that is not heard from is suspect at most. The same object as
        long as nothing has changed. now: monotonic seconds."""
        view = self._view
        if (
            view is None
            or now >= self._view_until
            or view.endpoint is not endpoint
            or view.fetch_speeds is not fetch_speeds
            or view.handoff_speeds is not handoff_speeds
            or view.lost_links != lost_links
            or self._view_version != self._pool.version
        ):
            fresh = self._look(endpoint, now, lost_links, fetch_speeds, handoff_speeds)
            view = self._view = view if fresh == view else fresh
            self._view_until = now + _VIEW_LIFE
            self._view_version = self._pool.version
        if endpoint.state is EngineState.READY and not usable:
            return replace(view, endpoint=replace(endpoint, state=EngineState.SUSPECT))
        return view

    def prompt_seconds(self, prompt_tokens: int, cached_tokens: int) -> float:
        """As router.load has it, on this engine."""
        return prompt_seconds(self._step_model(), self._capacity, prompt_tokens, cached_tokens)

    def _outdate(self) -> None:
        self._view = None
        self._on_change()

    def _look(
        self,
        endpoint: Endpoint,
        now: float,
        lost_links: frozenset[EngineKey],
        fetch_speeds: Mapping[EngineKey, float],
        handoff_speeds: Mapping[EngineKey, float],
    ) -> EngineView:
        model = self._step_model()
        return EngineView(
            endpoint=endpoint,
            load=self._load,
            load_at=self._load_at,
            capacity=self._capacity,
            step_model=model,
            booked=self._booked(),
            others_requests=self._others,
            recent_work=self._recent_work(now).seconds(model),
            kv_filled=self.kv_filled,
            lost_links=lost_links,
            fetch_speeds=fetch_speeds,
            handoff_speeds=handoff_speeds,
        )

    def _step_model(self) -> StepModel:
        """As the pool sees it, or the prior."""
        return self._pool.model(self._key) or self._calibrator.model

    def _booked(self) -> Booked:
        seen = self._load_at - _ON_THE_WAY
        others = self._elsewhere.booked()
        prompts = (*self._prompts.values(), *others.prompts)
        if others.prompts:
            prompts = tuple(sorted(prompts, key=lambda prompt: prompt.since))
        tokens = sum(prompt.tokens for prompt in prompts)
        return Booked(
            decoding=(*self._rows.values(), *others.decoding),
            reserved_tokens=self._reserved + others.reserved_tokens,
            prefilling=sum(request_id not in self._decoding for request_id in self._prompts) + others.prefilling,
            prompt_tokens=tokens,
            behind_tokens=tokens - prompts[0].tokens if prompts else 0,
            unseen=tuple(prompt for prompt in prompts if prompt.since > seen),
        )

    def _row(self, request_id: str) -> BookedDecode:
        booked = self._decoding[request_id]
        left = max(0, booked.max_tokens - self._written[request_id])
        return BookedDecode(expected_output(left), booked.prompt_tokens)

    def _book_prompt(self, reservation: Reservation) -> None:
        now = self._clock.monotonic()
        tokens = reservation.uncached_tokens
        self._prompts[reservation.request_id] = BookedPrompt(tokens, now)
        cached = reservation.prompt_tokens - tokens
        work = PromptWork.of(self._capacity, reservation.prompt_tokens, cached)
        self._recent = self._recent_work(now, work), now

    def _recent_work(self, now: float, more: PromptWork | None = None) -> PromptWork:
        """Kept as work, not as seconds: engines are compared by it, whatever steps were thought to take then."""
        work, at = self._recent
        return work.faded(exp((at - now) / RECENT_SECONDS), more)


def _reserved_by(reservation: Reservation) -> int:
    """KV tokens the request may grow to where it decodes."""
    return reservation.prompt_tokens + expected_output(reservation.max_tokens)
