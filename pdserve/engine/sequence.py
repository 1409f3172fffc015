"""A request's mutable state on one engine.

               ┌──────────────── preempt ────────────────┐
               ▼                                         │
    ──▶ WAITING ─────────────── admit ─────────────▶ RUNNING ──┐
         │ ▲  ├─ start_fetch ───▶ FETCHING ─ fetched ──▲  ▲    ├─ finish ─▶ FINISHED
         │ │  └─ start_restore ─▶ FETCHING ─ restored ────┘    │
         │ └────── lose_restore ─────┘                         │
         └─────────────────────────────────────────────────────┘

FETCHING is waiting for KV of the known tokens: of all of them from a ticket's source (fetch), or of a part from a
tier of this engine or the cache of another (restore).

Tokens and KV, by position (two steps may be in flight):

    token_ids                  prompt and output the host knows
    num_placeholders           tokens being sampled by steps in flight, right behind token_ids
    num_tokens                 both together: what the KV has to catch up with
    num_scheduled_tokens       KV of positions below is written once the submitted steps have run
    num_computed_tokens        KV of positions below is final (collected, hit, or fetched and verified)
"""

from dataclasses import dataclass, field
from enum import StrEnum

from pdserve.core.batch import Row, SamplerInit, TokenSource
from pdserve.core.blocks import BlockHash
from pdserve.core.request import LEAST_TEMPERATURE, Request
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.engine.stopping import StopRule


class SequenceState(StrEnum):
    WAITING = "waiting"
    FETCHING = "fetching"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class Leave:
    """A running sequence is about to move to another engine: its ticket, the tokens whose KV it covers and may come
    to cover, and whether it starts no more steps."""

    ticket_id: str
    num_tokens: int
    max_tokens: int
    stopping: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """See the module's figure. A transition from a state it does not start in raises ValueError.

    handoff: ends here after its first token; another engine goes on. ticket: KV is still to be fetched. source: another
    engine that should hold KV of the prompt's beginning; it is asked once.
    admission counts how often blocks were given, so that rows of an earlier life are recognised.
    """

    sequence_id: int
    request: Request
    rule: StopRule
    namespace: bytes
    deadline: float
    handoff: bool = False
    ticket: TransferTicket | None = None
    source: KVSource | None = None
    leave: Leave | None = None
    restorable: bool = True
    """Cleared when a tier or a source did not answer in time: then the tokens are computed."""
    num_restoring_tokens: int = 0
    """KV of positions [num_computed_tokens, this) is being restored."""
    restoring_from: KVSource | None = None
    """None: from a tier of this engine."""
    token_ids: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    num_placeholders: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    admission: int = 0
    sampler_sent: bool = False
    stamps: list[tuple[str, float]] = field(default_factory=list)
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_pending_tokens(self) -> int:
        """Tokens a step could compute now; 0 also when the tokens in flight are the last ones allowed here."""
        if self.leave and self.leave.stopping:
            return 0
        num_tokens = len(self.token_ids) + self.num_placeholders
        if self.num_placeholders and num_tokens - self.prompt_len >= self.max_output_tokens:
            return 0
        return num_tokens - self.num_scheduled_tokens

    @property
    def num_fetch_tokens(self) -> int:
        """Positions that need blocks before a ticket's KV may be fetched."""
        return self.ticket.max_tokens if self.ticket else 0

    @property
    def pinned(self) -> bool:
        """Whether its blocks are promised to others."""
        return self.handoff or self.leave is not None

    @property
    def max_output_tokens(self) -> int:
        return 1 if self.handoff else self.rule.max_output_tokens

    def admit(self, num_hit_tokens: int) -> None:
        """WAITING → RUNNING with KV of the first num_hit_tokens found in the prefix cache."""
        self._move(SequenceState.RUNNING, SequenceState.WAITING)
        self._enter(num_hit_tokens)

    def start_fetch(self, num_hit_tokens: int) -> None:
        """WAITING → FETCHING: blocks are there, the rest of the prompt's KV is on its way."""
        self._move(SequenceState.FETCHING, SequenceState.WAITING)
        self._enter(num_hit_tokens)

    def fetched(self, token_ids: tuple[int, ...]) -> None:
        """FETCHING → RUNNING: KV is verified of all tokens but the last; the source has emitted token_ids."""
        self._move(SequenceState.RUNNING, SequenceState.FETCHING)
        self.ticket = None
        self.token_ids += token_ids
        self.num_scheduled_tokens = self.num_computed_tokens = len(self.token_ids) - 1

    def start_restore(self, num_hit_tokens: int, upto_tokens: int, source: KVSource | None = None) -> None:
        """WAITING → FETCHING: blocks are there; a tier, or the source, holds KV up to upto_tokens, the rest is to be
        computed."""
        self._move(SequenceState.FETCHING, SequenceState.WAITING)
        self._enter(num_hit_tokens)
        self.num_restoring_tokens = upto_tokens
        self.restoring_from = source
        if source:
            self.source = None

    def restored(self, num_tokens: int) -> None:
        """FETCHING → RUNNING: KV of the first num_tokens is here and verified."""
        self._move(SequenceState.RUNNING, SequenceState.FETCHING)
        self.num_restoring_tokens = 0
        self.num_scheduled_tokens = self.num_computed_tokens = num_tokens
        if self.admission == 1:
            self.num_cached_tokens = num_tokens

    def lose_restore(self) -> None:
        """FETCHING → WAITING without KV, to be computed."""
        self._move(SequenceState.WAITING, SequenceState.FETCHING)
        self.restorable = False
        self.num_restoring_tokens = self.num_scheduled_tokens = self.num_computed_tokens = 0
        if self.admission == 1:
            self.num_cached_tokens = None

    def preempt(self) -> bool:
        """RUNNING → WAITING without KV. True if the worker holds sampler state to drop."""
        self._move(SequenceState.WAITING, SequenceState.RUNNING)
        self.num_scheduled_tokens = self.num_computed_tokens = 0
        held, self.sampler_sent = self.sampler_sent, False
        return held

    def finish(self) -> None:
        """Any live state → FINISHED."""
        self._move(SequenceState.FINISHED, SequenceState.WAITING, SequenceState.FETCHING, SequenceState.RUNNING)

    def schedule(self, num_tokens: int, block_ids: tuple[int, ...]) -> Row:
        """Count num_tokens more as submitted and write their row."""
        start = self.num_scheduled_tokens
        known = start < len(self.token_ids)
        sample = start + num_tokens == self.num_tokens
        sampler = None
        if sample and not self.sampler_sent:
            sampler = sampler_init(self)
            self.sampler_sent = True
        self.num_scheduled_tokens += num_tokens
        self.num_placeholders += sample
        return Row(
            sequence_id=self.sequence_id,
            start=start,
            num_tokens=num_tokens,
            token_ids=tuple(self.token_ids[start : start + num_tokens]) if known else (),
            block_ids=block_ids,
            token_source=TokenSource.KNOWN if known else TokenSource.PREVIOUS_STEP,
            sample=sample,
            sampler=sampler,
        )

    def receive(self, token_id: int) -> None:
        """A placeholder's token arrived."""
        self.num_placeholders -= 1
        self.token_ids.append(token_id)

    def stamp(self, name: str, unix: float) -> None:
        self.stamps.append((name, unix))

    def _enter(self, num_hit_tokens: int) -> None:
        self.admission += 1
        self.num_scheduled_tokens = self.num_computed_tokens = num_hit_tokens
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_hit_tokens

    def _move(self, to: SequenceState, *allowed: SequenceState) -> None:
        if self.state not in allowed:
            raise ValueError(f"sequence {self.sequence_id} is {self.state} and cannot become {to}")
        self.state = to


def sampler_init(sequence: Sequence) -> SamplerInit:
    """The sampler's state for a sequence all of whose tokens are known."""
    sampling = sequence.request.sampling
    if sampling.seed is None:
        raise ValueError(f"sequence {sequence.sequence_id} has no seed")
    return SamplerInit(
        temperature=sampling.temperature if sampling.temperature >= LEAST_TEMPERATURE else 0.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        sample_index=sequence.request.sample_index,
        logprobs=sampling.logprobs,
        min_tokens=sampling.min_tokens,
        banned_token_ids=tuple(sorted(sequence.rule.stop_ids)) if sampling.min_tokens else (),
        prompt_len=sequence.prompt_len,
        seen_token_ids=tuple(sequence.token_ids),
    )
