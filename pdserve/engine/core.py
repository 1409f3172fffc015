"""The engine's synchronous brain: requests in, batches out, step results in, events out.

It neither waits nor does I/O. Its caller pumps it:

    batch = core.schedule()          until None: nothing can run now, or depth steps are in flight
    core.take_events()               after every schedule: handoffs and fetches that may begin
    core.complete(await collect())   steps in the order of their numbers

and calls schedule again after everything that can make work: add, complete, abort, fetched, fetch_failed, stop,
lease_ended, restore_ended, restore_late, and what gives blocks of core.kv back: saved, unquarantine. Every returned
list starts with events not taken yet, so that events are always seen in the order in which they happened.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pdserve.core.batch import Batch, Row, RowOutput, StepOutput
from pdserve.core.blocks import hash_namespace
from pdserve.core.clock import Clock
from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import DeadlineExceeded, LeaseExpired, NotANumber, PdserveError
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import ModelInfo
from pdserve.core.request import FinishReason, Request
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.engine import leave
from pdserve.engine.admission import AdmissionRules
from pdserve.engine.core_events import (
    Computed,
    CoreEvent,
    Departing,
    FetchAborted,
    FetchReady,
    HandoffScheduled,
    SaveReady,
)
from pdserve.engine.core_load import CoreLoad, load_of
from pdserve.engine.deadlines import Deadlines
from pdserve.engine.restores import Restores
from pdserve.engine.scheduler import ChooseFetch, ChooseRestore, Scheduler, StepPlan
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.engine.sequence_events import emitted, finished
from pdserve.engine.stopping import stop_rule
from pdserve.kvcache.manager import KVCacheManager
from pdserve.kvcache.tier_index import TierIndex


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A submitted step: per row its sequence, and which of the sequence's lives the row belongs to."""

    step: int
    rows: tuple[Row, ...]
    sequences: list[Sequence]
    admissions: list[int]


class EngineCore:
    """Scheduler and KV bookkeeping of one engine. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        limits: EngineLimits,
        layout: KVLayout,
        clock: Clock,
        new_ticket_id: Callable[[], str],
        tiers: TierIndex | None = None,
        choose_restore: ChooseRestore = lambda tiers: 0,
        choose_fetch: ChooseFetch = lambda source, num_blocks: 0,
    ) -> None:
        self.limits = limits
        self.kv = KVCacheManager(
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            prefix_caching=limits.prefix_caching,
            tiers=tiers,
        )
        self._info = info
        self._clock = clock
        self._new_ticket_id = new_ticket_id
        self._rules = AdmissionRules(
            info=info, limits=limits, num_blocks=layout.num_blocks, block_size=layout.block_size
        )
        self._scheduler = Scheduler(limits, self.kv, choose_restore, choose_fetch)
        self._restores = Restores(self._scheduler, self.kv)
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._next_step = 0
        self._steps: deque[_InFlight] = deque()
        self._released: list[int] = []
        self._deadlines = Deadlines(self._sequences.__contains__)
        self._events: list[CoreEvent] = []

    def limit(self, limits: EngineLimits) -> None:
        """Other limits from the next step on. Whether prefixes are cached, and how many steps are in flight, stays."""
        kept = replace(limits, prefix_caching=self.limits.prefix_caching, depth=self.limits.depth)
        self.limits = kept
        self._rules = replace(self._rules, limits=kept)
        self._scheduler.limit(kept)

    @property
    def max_len(self) -> int:
        """Most tokens, prompt and output together, a sequence can have here."""
        return self._rules.max_len

    @property
    def in_flight(self) -> int:
        """Steps scheduled and not completed yet."""
        return len(self._steps)

    @property
    def has_work(self) -> bool:
        """Whether any sequence lives here or any step is in flight. Leases are not work."""
        return bool(self._sequences or self._steps)

    @property
    def next_deadline(self) -> float | None:
        """Monotonic time at which expire has something to do."""
        return self._deadlines.next

    def load(self) -> CoreLoad:
        return load_of(self._scheduler, self.kv.counts())

    def add(
        self,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> int:
        """Queue a request; returns its sequence id, which is never used again.

        handoff: compute the prompt, lease its blocks, end after the first token. ticket: fetch the
        prompt's KV from the ticket's source, then go on from its first token. source: another engine that should hold
        KV of the prompt's beginning.
        Raises InvalidRequest, Unsupported, or LayoutMismatch if it can never run here."""
        self._rules.check(request, handoff=handoff, ticket=ticket)
        sequence = Sequence(
            sequence_id=self._next_id,
            request=request,
            rule=stop_rule(
                request.sampling,
                prompt_len=len(request.prompt_token_ids),
                eos_token_ids=self._info.eos_token_ids,
                max_len=self.max_len,
            ),
            namespace=hash_namespace(request.salt, self._info.revision),
            deadline=self._clock.monotonic() + request.timeout,
            handoff=handoff,
            ticket=ticket,
            source=source,
        )
        self._next_id += 1
        self._sequences[sequence.sequence_id] = sequence
        self._deadlines.add(sequence.sequence_id, sequence.deadline)
        self._scheduler.add(sequence)
        self._stamp(sequence, "queued")
        return sequence.sequence_id

    def schedule(self) -> Batch | None:
        """The next step, or None when nothing can run now or depth steps are in flight."""
        if len(self._steps) >= self.limits.depth:
            return None
        plan = self._scheduler.schedule(self._next_step - 1)
        self._announce(plan)
        self._released += plan.released
        if not plan.rows:
            return None
        batch = Batch(step=self._next_step, rows=tuple(plan.rows), released=tuple(self._released))
        self._released.clear()
        admissions = [sequence.admission for sequence in plan.scheduled]
        self._steps.append(_InFlight(batch.step, batch.rows, plan.scheduled, admissions))
        self._next_step += 1
        return batch

    def take_events(self) -> list[CoreEvent]:
        """Events not returned yet."""
        blocks, used, wrong = self.kv.take_saves()
        if blocks or used or wrong:
            self._events.append(SaveReady(blocks=blocks, used=used, wrong=wrong))
        events, self._events = self._events, []
        return events

    def complete(self, output: StepOutput) -> list[CoreEvent]:
        """Take in the oldest step in flight."""
        if not self._steps or self._steps[0].step != output.step:
            raise ValueError(f"step {output.step} completed, but the oldest in flight is another")
        submitted = self._steps.popleft()
        self.kv.completed(submitted.step)
        sampled = iter(output.rows)
        for row, sequence, admission in zip(submitted.rows, submitted.sequences, submitted.admissions, strict=True):
            result = next(sampled, None) if row.sample else None
            if row.sample and (result is None or result.sequence_id != row.sequence_id):
                raise ValueError(f"step {output.step} has no output for sequence {row.sequence_id}")
            # Otherwise it ended after this row was submitted: a token too many is discarded here.
            if sequence.state is not SequenceState.FINISHED:
                self._collect(sequence, row, admission, result)
        return self.take_events()

    def abort(self, sequence_id: int, error: PdserveError | None = None) -> list[CoreEvent]:
        """End a sequence now: CANCELLED, or ERROR with the error. An unknown id is fine: it ended before."""
        if sequence := self._sequences.get(sequence_id):
            self._abort(sequence, error)
        return self.take_events()

    def expire(self, now: float) -> list[CoreEvent]:
        """Abort every request whose deadline (monotonic) has passed."""
        while (sequence_id := self._deadlines.pop(now)) is not None:
            sequence = self._sequences[sequence_id]
            timeout = sequence.request.timeout
            self._abort(sequence, DeadlineExceeded(f"the request did not finish within its {timeout:g} s"))
        return self.take_events()

    def fetched(self, sequence_id: int, token_ids: tuple[int, ...]) -> list[CoreEvent]:
        """The ticket's KV arrived and is verified; token_ids were emitted by the source, the last without KV.

        A sequence that ended meanwhile is ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._scheduler.fetched(sequence, token_ids)
            self._stamp(sequence, "fetched")
            if reason := sequence.rule.reason(token_ids[-1], len(token_ids)):
                self._events.append(emitted(sequence, index=len(token_ids), finish_reason=reason))
                self._finish(sequence)
        return self.take_events()

    def depart(self, sequence_id: int) -> Departing | None:
        """Let a running sequence get ready to move to another engine. None when it is not at a point, right behind
        a sampled token, where that can be; an unknown one has ended."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not leave.may_leave(sequence, self.limits):
            return None
        self._stamp(sequence, "departing")
        return leave.begin(sequence, self._new_ticket_id(), self.kv)

    def stop(self, sequence_id: int) -> list[CoreEvent]:
        """Its target has caught up: a leaving sequence starts no more steps. Others are ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and sequence.leave:
            sequence.leave.stopping = True
            self._hand_over_stopped(sequence)
        return self.take_events()

    def fetch_failed(
        self, sequence_id: int, quarantined: Iterable[int] = (), error: PdserveError | None = None
    ) -> list[CoreEvent]:
        """A fetch, started or still queued, ended without KV. The quarantined target blocks may still be
        written and come back by unquarantine; the others are free at once. error None: nobody waits for
        the answer, as when the request ended on the source. An ended sequence is ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self.kv.quarantine(quarantined)
            self._end(sequence, error)
        return self.take_events()

    def restore_ended(self, sequence_id: int, admission: int, num_blocks: int) -> list[CoreEvent]:
        """Nothing writes into a RestoreReady's blocks any more; its first num_blocks are verified."""
        if self._restores.ended(sequence_id, admission):
            return self.take_events()
        if sequence := self._sequences.get(sequence_id):
            self._scheduler.restored(sequence, num_blocks)
            self._stamp(sequence, "restored")
            if sequence.handoff:
                self._events.append(self._lease(sequence))
        return self.take_events()

    def restore_late(self, sequence_id: int, admission: int) -> None:
        """A restore has not ended in time: its sequence computes instead, in other blocks."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and not self._restores.is_abandoned(sequence_id, admission):
            self._restores.abandon(sequence)
            self._scheduler.lose_restore(sequence, self._next_step - 1)

    def lease_ended(self, ticket_id: str, sequence_id: int | None) -> list[CoreEvent]:
        """A lease is over: its blocks serve others again. A prompt is aborted, a sequence that was leaving stays."""
        self.kv.release(ticket_id)
        sequence = self._sequences.get(sequence_id) if sequence_id is not None else None
        if sequence is not None and sequence.handoff:
            self._abort(sequence, LeaseExpired("nobody took over the prefilled prompt in time"))
        elif sequence is not None and sequence.leave and sequence.leave.ticket_id == ticket_id:
            sequence.leave = None
        return self.take_events()

    def _announce(self, plan: StepPlan) -> None:
        for sequence in plan.preempted:
            self._stamp(sequence, "preempted")
        for sequence in plan.fetching:
            self._stamp(sequence, "fetching")
            self._events.append(self._fetch_ready(sequence))
        for sequence in plan.restoring:
            self._stamp(sequence, "scheduled" if sequence.admission == 1 else "resumed")
            self._stamp(sequence, "restoring")
            self._events.append(self._restores.ready(sequence))
        for sequence in plan.admitted:
            self._stamp(sequence, "scheduled" if sequence.admission == 1 else "resumed")
            if sequence.handoff:
                self._events.append(self._lease(sequence))

    def _fetch_ready(self, sequence: Sequence) -> FetchReady:
        assert sequence.ticket is not None
        return FetchReady(
            sequence_id=sequence.sequence_id,
            request_id=sequence.request.id,
            ticket=sequence.ticket,
            fetch_blocks=self._scheduler.fetch_blocks(sequence),
        )

    def _lease(self, sequence: Sequence) -> HandoffScheduled:
        ticket_id = self._new_ticket_id()
        return HandoffScheduled(
            sequence_id=sequence.sequence_id,
            request_id=sequence.request.id,
            ticket_id=ticket_id,
            num_tokens=sequence.prompt_len,
            source_blocks=self.kv.lease(sequence, ticket_id, sequence.prompt_len),
            num_cached_tokens=sequence.num_cached_tokens or 0,
        )

    def _collect(self, sequence: Sequence, row: Row, admission: int, result: RowOutput | None) -> None:
        if result is not None and not result.token_ids:
            self._fail_computation(sequence)
            return
        if admission == sequence.admission and sequence.state is SequenceState.RUNNING:
            self._computed(sequence, row.start + row.num_tokens)
        if result is not None:
            self._receive(sequence, result)
        if sequence.leave:
            self._hand_over_stopped(sequence)

    def _computed(self, sequence: Sequence, num_tokens: int) -> None:
        before, sequence.num_computed_tokens = sequence.num_computed_tokens, num_tokens
        if before // self.kv.block_size != num_tokens // self.kv.block_size:
            self.kv.commit(sequence, num_tokens)
        if before < sequence.prompt_len <= num_tokens and not sequence.num_output_tokens:
            self._stamp(sequence, "prompt_computed")
        if sequence.handoff:
            self._events.append(Computed(sequence_id=sequence.sequence_id, num_tokens=num_tokens))
        elif sequence.leave and (event := leave.grown(sequence, before, self.limits, self.kv)):
            self._events.append(event)

    def _fail_computation(self, sequence: Sequence) -> None:
        """Its KV is not to be trusted either, so nobody else shall find it."""
        self.kv.forget(sequence)
        text = "the model computed NaN or infinity instead of scores for the next token; its weights may be damaged"
        self._abort(sequence, NotANumber(text))

    def _receive(self, sequence: Sequence, result: RowOutput) -> None:
        """A sampled token: also of a sequence preempted since, for its KV was right when it was drawn."""
        if len(result.token_ids) != 1:
            raise ValueError(f"a row without drafts yields one token, not {len(result.token_ids)}")
        token_id, index = result.token_ids[0], sequence.num_output_tokens
        sequence.receive(token_id)
        if index == 0:
            self._stamp(sequence, "first_token")
        reason = sequence.rule.reason(token_id, index + 1)
        self._events.append(emitted(sequence, index, result.token_ids, result.logprobs, reason))
        if reason or index + 1 >= sequence.max_output_tokens:
            self._finish(sequence)

    def _hand_over_stopped(self, sequence: Sequence) -> None:
        if leave.has_stopped(sequence) and sequence.state is SequenceState.RUNNING:
            self._events.append(leave.hand_over(sequence, self.kv))
            self._events.append(emitted(sequence, sequence.num_output_tokens, finish_reason=FinishReason.HANDOFF))
            self._finish(sequence)

    def _abort(self, sequence: Sequence, error: PdserveError | None) -> None:
        if sequence.num_restoring_tokens:
            self._restores.abandon(sequence)
        elif sequence.state is SequenceState.FETCHING:
            blocks = tuple(self._scheduler.fetch_blocks(sequence).values())
            self.kv.quarantine(blocks)
            self._events.append(FetchAborted(sequence_id=sequence.sequence_id, block_ids=blocks))
        self._end(sequence, error)

    def _end(self, sequence: Sequence, error: PdserveError | None) -> None:
        reason = FinishReason.ERROR if error else FinishReason.CANCELLED
        self._events.append(emitted(sequence, sequence.num_output_tokens, finish_reason=reason, error=error))
        self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence, self._next_step - 1)
        if sequence.sampler_sent:
            self._released.append(sequence.sequence_id)
        del self._sequences[sequence.sequence_id]
        self._stamp(sequence, "finished")
        self._events.append(finished(sequence))

    def _stamp(self, sequence: Sequence, name: str) -> None:
        sequence.stamp(name, self._clock.unix())
