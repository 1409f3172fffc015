"""A toy model whose every token depends on all KV it can see, read slot by slot through the block table.

A wrong block, a stale reuse, a missed copy or a lost sampler history changes the tokens. The device runs
a step as late as it may (when it is collected), so writes that overtake a step in flight do damage.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.batch import Batch, Row, RowOutput, SamplerInit, StepOutput, TokenSource
from pdserve.core.endpoint import EngineLimits
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import ModelInfo
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import (
    Computed,
    CoreEvent,
    Emitted,
    FetchAborted,
    FetchReady,
    Finished,
    HandoffScheduled,
    RestoreReady,
    SaveReady,
)
from pdserve.kvcache.tier_index import TierIndex

VOCAB = 40
EOS = 0
MAX_MODEL_LEN = 200
INFO = ModelInfo(name="toy", revision="r1", vocab_size=VOCAB, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,))


class FakeClock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now + 1e9

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_layout(num_blocks: int, block_size: int) -> KVLayout:
    group = KVGroup(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
    return KVLayout(group=group, block_size=block_size, num_blocks=num_blocks)


def make_core(
    limits: EngineLimits | None = None,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    clock: FakeClock | None = None,
    tiers: TierIndex | None = None,
) -> EngineCore:
    """With tiers, everything they hold is restored; with a source, everything it should hold is fetched."""
    numbers = iter(range(10**9))
    return EngineCore(
        info=INFO,
        limits=limits or EngineLimits(),
        layout=make_layout(num_blocks, block_size),
        clock=clock or FakeClock(),
        new_ticket_id=lambda: f"ticket-{next(numbers)}",
        tiers=tiers,
        choose_restore=len,
        choose_fetch=lambda source, num_blocks: num_blocks,
    )


def make_request(
    request_id: str, prompt: Sequence[int], *, salt: bytes = b"", timeout: float = 600.0, **sampling: Any
) -> Request:
    params: dict[str, Any] = {"seed": 1, "max_tokens": 8, **sampling}
    return Request(
        id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**params),
        salt=salt,
        timeout=timeout,
    )


def kv_value(history: Sequence[int], token_id: int) -> int:
    """KV of a token, given the KV of all positions before it."""
    return hash((token_id, len(history), *history))


def draw(history: Sequence[int], seen: Sequence[int], init: SamplerInit) -> int:
    """The next token: one of the vocabulary, EOS now and then, never a banned one."""
    token = hash((init.seed, *history, -1, *seen)) % VOCAB
    banned = init.banned_token_ids if len(seen) - init.prompt_len < init.min_tokens else ()
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def oracle(request: Request, max_len: int = MAX_MODEL_LEN) -> tuple[tuple[int, ...], FinishReason]:
    """What the toy model answers, written down the plain way: no blocks, no batches, no cache."""
    sampling = request.sampling
    stop = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    init = SamplerInit(
        seed=sampling.seed or 0,
        min_tokens=sampling.min_tokens,
        banned_token_ids=tuple(stop),
        prompt_len=len(request.prompt_token_ids),
    )
    seen = list(request.prompt_token_ids)
    history: list[int] = []
    output: list[int] = []
    while True:
        for token in seen[len(history) :]:
            history.append(kv_value(history, token))
        token = draw(history, seen, init)
        seen.append(token)
        output.append(token)
        if token in stop and len(output) > sampling.min_tokens:
            return tuple(output), FinishReason.STOP
        if len(output) == sampling.max_tokens or len(seen) == max_len:
            return tuple(output), FinishReason.LENGTH


@dataclass(slots=True)
class _Sampler:
    init: SamplerInit
    seen: list[int]


class ToyDevice:
    """KV memory and the worker's state; executes batches in order, each when it is collected."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.kv = [0] * (num_blocks * block_size)
        self._queue: deque[Batch] = deque()
        self._samplers: dict[int, _Sampler] = {}
        self._previous: dict[int, int] = {}
        self._steps = 0
        self.breaks: int | None = None
        """The sequence whose scores are no numbers."""

    def submit(self, batch: Batch) -> None:
        assert batch.step == self._steps, "steps are numbered from 0 without gaps"
        self._steps += 1
        self._queue.append(batch)

    def collect(self) -> StepOutput:
        batch = self._queue.popleft()
        for sequence_id in batch.released:
            del self._samplers[sequence_id]
        sampled = {row.sequence_id: self._run(row) for row in batch.rows}
        self._previous = {sequence_id: token for sequence_id, token in sampled.items() if token is not None}
        rows = tuple(
            RowOutput(sequence_id=s, token_ids=() if s == self.breaks else (t,)) for s, t in self._previous.items()
        )
        return StepOutput(step=batch.step, rows=rows)

    def block(self, block_id: int) -> list[int]:
        return self.kv[block_id * self.block_size : (block_id + 1) * self.block_size]

    def write_block(self, block_id: int, values: Sequence[int]) -> None:
        self.kv[block_id * self.block_size : (block_id + 1) * self.block_size] = values

    def _run(self, row: Row) -> int | None:
        if row.token_source is TokenSource.PREVIOUS_STEP:
            assert row.num_tokens == 1
            assert row.token_ids == ()
            tokens: tuple[int, ...] = (self._previous[row.sequence_id],)
        else:
            tokens = row.token_ids
        assert len(tokens) == row.num_tokens
        slots = [self._slot(row, position) for position in range(row.start + row.num_tokens)]
        history = [self.kv[slot] for slot in slots[: row.start]]
        for token, slot in zip(tokens, slots[row.start :], strict=True):
            self.kv[slot] = kv_value(history, token)
            history.append(self.kv[slot])
        if not row.sample:
            return None
        if row.sampler:
            assert row.sequence_id not in self._samplers, "sampler state sent twice without a release"
            self._samplers[row.sequence_id] = _Sampler(row.sampler, list(row.sampler.seen_token_ids))
        sampler = self._samplers[row.sequence_id]
        token = draw(history, sampler.seen, sampler.init)
        sampler.seen.append(token)
        return token

    def _slot(self, row: Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size


@dataclass(slots=True)
class Answer:
    """What a client saw of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    first_index: int | None = None
    finish_reason: FinishReason | None = None
    error: tuple[str, str] | None = None
    finished: bool = False
    cached_tokens: int = 0
    stamps: tuple[tuple[str, float], ...] = ()


class ToyEngine:
    """A core with a device, driven by hand. Checks the bookkeeping after every move."""

    def __init__(
        self,
        limits: EngineLimits | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        clock: FakeClock | None = None,
        tiers: TierIndex | None = None,
    ) -> None:
        self.core = make_core(limits, num_blocks=num_blocks, block_size=block_size, clock=clock, tiers=tiers)
        self.device = ToyDevice(num_blocks, block_size)
        self.answers: dict[int, Answer] = {}
        self.batches: list[Batch] = []
        self.log: list[CoreEvent] = []
        self.on_event: Callable[[CoreEvent], None] = lambda event: None

    def add(
        self,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> int:
        sequence_id = self.core.add(request, handoff=handoff, ticket=ticket, source=source)
        self.answers[sequence_id] = Answer()
        return sequence_id

    def submit(self) -> bool:
        """Schedule a step if one can run; True if so."""
        batch = self.core.schedule()
        self.absorb(self.core.take_events())
        if batch is not None:
            self._check_batch(batch)
            self.batches.append(batch)
            self.device.submit(batch)
        self.core.kv.check()
        return batch is not None

    def collect(self) -> None:
        self.absorb(self.core.complete(self.device.collect()))
        self.core.kv.check()

    def advance(self) -> bool:
        """Submit, else collect; False when neither is possible."""
        if self.submit():
            return True
        if not self.core.in_flight:
            return False
        self.collect()
        return True

    def run(self, max_moves: int = 5000) -> None:
        """Until idle. A core that never gets there is stuck or loops."""
        for _ in range(max_moves):
            if not self.advance():
                return
        raise AssertionError(f"not idle after {max_moves} moves")

    def absorb(self, events: list[CoreEvent]) -> None:
        for event in events:
            if isinstance(event, SaveReady):
                self.on_event(event)
                continue
            self.log.append(event)
            answer = self.answers[event.sequence_id]
            assert not answer.finished, f"{event} after Finished"
            match event:
                case Emitted():
                    self._emitted(answer, event)
                case Finished():
                    answer.finished = True
                    answer.cached_tokens = event.cached_tokens
                    answer.stamps = event.stamps
                case HandoffScheduled() | Computed() | FetchReady() | FetchAborted() | RestoreReady():
                    pass
            self.on_event(event)

    def events(self, sequence_id: int) -> list[CoreEvent]:
        return [e for e in self.log if not isinstance(e, SaveReady) and e.sequence_id == sequence_id]

    def assert_idle(self) -> None:
        """Nothing lives here and every block is free."""
        assert not self.core.has_work
        counts = self.core.kv.counts()
        assert counts.free == counts.total, counts

    def _emitted(self, answer: Answer, event: Emitted) -> None:
        assert answer.finish_reason is None, "tokens after the finish reason"
        if answer.first_index is None:
            answer.first_index = event.index
        assert event.index == answer.first_index + len(answer.token_ids), "a gap or repeat in the output"
        answer.token_ids += event.token_ids
        answer.finish_reason = event.finish_reason
        answer.error = event.error

    def _check_batch(self, batch: Batch) -> None:
        limits = self.core.limits
        assert batch.rows
        assert len(batch.rows) <= limits.max_rows
        assert batch.num_tokens <= limits.max_tokens_per_step
        assert all(row.num_tokens <= limits.chunk_size for row in batch.rows)
        assert len({row.sequence_id for row in batch.rows}) == len(batch.rows)
        assert self.core.in_flight <= limits.depth
