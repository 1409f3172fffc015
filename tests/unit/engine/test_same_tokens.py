"""Whatever the limits, the order of events and the shortage of blocks: the same tokens as the plain oracle.

Fetches write garbage into their targets at the first moment they may and, when they were aborted, until
the last moment they may; the toy device runs steps as late as possible. So any block in two hands at once
shows up as a wrong token.
"""

from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import TransferFailed
from pdserve.core.request import FinishReason, Request
from pdserve.engine.core_events import Computed, CoreEvent, FetchAborted, FetchReady, HandoffScheduled, SaveReady
from tests.unit.engine.tickets import make_ticket
from tests.unit.engine.toy import ToyEngine, make_request, oracle

MAX_MOVES = 6000


@st.composite
def engine_limits(draw: st.DrawFn) -> EngineLimits:
    return EngineLimits(
        max_tokens_per_step=draw(st.integers(1, 20)),
        max_rows=draw(st.integers(1, 5)),
        chunk_size=draw(st.integers(1, 12)),
        max_model_len=draw(st.sampled_from([24, 60])),
        prefix_caching=draw(st.booleans()),
        depth=draw(st.sampled_from([1, 2])),
    )


@st.composite
def requests(draw: st.DrawFn, max_prompt: int) -> list[Request]:
    """Prompts share prefixes of one of two texts; two tenants."""
    found = []
    for number in range(draw(st.integers(1, 6))):
        text = Random(draw(st.integers(0, 1))).choices(range(1, 30), k=40)
        shared = draw(st.integers(0, max_prompt - 1))
        prompt = text[:shared] + draw(st.lists(st.integers(0, 3), min_size=1, max_size=max_prompt - shared))
        max_tokens = draw(st.integers(1, 14))
        request = make_request(
            f"r{number}",
            prompt,
            salt=draw(st.sampled_from([b"x", b"y"])),
            seed=draw(st.integers(0, 3)),
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, max_tokens)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, 39), max_size=2))),
        )
        found.append(request)
    return found


def assert_answer(engine: ToyEngine, sequence_id: int, request: Request, aborted: bool) -> None:
    answer = engine.answers[sequence_id]
    expected, reason = oracle(request, engine.core.max_len)
    assert answer.finished
    if aborted and answer.finish_reason is FinishReason.CANCELLED:
        assert tuple(answer.token_ids) == expected[: len(answer.token_ids)]
    else:
        assert (tuple(answer.token_ids), answer.finish_reason) == (expected, reason)


@settings(max_examples=250, deadline=None)
@given(
    limits=engine_limits(), asks=requests(max_prompt=15), extra_blocks=st.integers(0, 12), chance=st.integers(0, 10**6)
)
def test_one_engine_equals_the_oracle(
    limits: EngineLimits, asks: list[Request], extra_blocks: int, chance: int
) -> None:
    rng = Random(chance)
    engine = ToyEngine(limits, num_blocks=4 + extra_blocks, block_size=4)
    pending, ids, aborted = list(asks), {}, set()
    for _ in range(MAX_MOVES):
        move = rng.random()
        if pending and move < 0.15:
            request = pending.pop(0)
            ids[request.id] = engine.add(request)
        elif ids and move < 0.17:
            victim = rng.choice(list(ids.values()))
            aborted.add(victim)
            engine.absorb(engine.core.abort(victim))
        elif move < 0.55:
            engine.submit()
        elif engine.core.in_flight:
            engine.collect()
        if not pending and not engine.core.has_work:
            break
    else:
        raise AssertionError("stuck")
    for request in asks:
        assert_answer(engine, ids[request.id], request, ids[request.id] in aborted)
    engine.assert_idle()


@settings(max_examples=60, deadline=None)
@given(limits=engine_limits(), asks=requests(max_prompt=15), num_blocks=st.integers(4, 9))
def test_depth_one_and_depth_two_give_the_same_tokens(
    limits: EngineLimits, asks: list[Request], num_blocks: int
) -> None:
    outputs = []
    for depth in (1, 2):
        engine = ToyEngine(
            EngineLimits(
                max_tokens_per_step=limits.max_tokens_per_step,
                max_rows=limits.max_rows,
                chunk_size=limits.chunk_size,
                max_model_len=24,
                depth=depth,
            ),
            num_blocks=num_blocks,
            block_size=4,
        )
        ids = [engine.add(request) for request in asks]
        engine.run()
        outputs.append([(engine.answers[i].token_ids, engine.answers[i].finish_reason) for i in ids])
        engine.assert_idle()
    assert outputs[0] == outputs[1]


@dataclass
class _Handoff:
    """One request on its way through both engines, as a transfer sees it."""

    request: Request
    prefill_id: int
    source: HandoffScheduled | None = None
    num_final: int = 0
    decode_id: int | None = None
    targets: dict[int, int] | None = None
    arrived: int = 0
    fails: bool = False


class _Pair:
    """A prefill and a decode engine with a hostile transfer between them."""

    def __init__(self, rng: Random, limits: tuple[EngineLimits, EngineLimits], blocks: tuple[int, int]) -> None:
        self.rng = rng
        self.prefill = ToyEngine(limits[0], num_blocks=blocks[0], block_size=4)
        self.decode = ToyEngine(limits[1], num_blocks=blocks[1], block_size=4)
        self.prefill.on_event = self._on_prefill
        self.decode.on_event = self._on_decode
        self.handoffs: list[_Handoff] = []
        self.unsettled: set[int] = set()

    def start(self, request: Request) -> None:
        prefill_id = self.prefill.add(request, handoff=True)
        self.handoffs.append(_Handoff(request, prefill_id, fails=self.rng.random() < 0.15))

    def move(self) -> None:
        engine = self.rng.choice([self.prefill, self.decode])
        choice = self.rng.random()
        if choice < 0.4:
            engine.submit()
        elif choice < 0.7:
            if engine.core.in_flight:
                engine.collect()
        elif self.unsettled and choice < 0.8:
            block_id = self.rng.choice(sorted(self.unsettled))
            self._scribble(block_id)
            if self.rng.random() < 0.5:
                self.unsettled.remove(block_id)
                self.decode.core.kv.unquarantine([block_id])
        elif self.handoffs:
            self._transfer(self.rng.choice(self.handoffs))

    @property
    def busy(self) -> bool:
        leased = self.prefill.core.kv.counts().leased
        return bool(self.prefill.core.has_work or self.decode.core.has_work or self.unsettled or leased)

    def _transfer(self, handoff: _Handoff) -> None:
        if handoff.source is None:
            return
        if handoff.decode_id is None:
            ticket = make_ticket(handoff.request, block_size=4, ticket_id=handoff.source.ticket_id)
            handoff.decode_id = self.decode.add(handoff.request, ticket=ticket)
        elif handoff.targets is not None:
            self._advance(handoff, handoff.source, handoff.decode_id, handoff.targets)

    def _advance(self, handoff: _Handoff, source: HandoffScheduled, decode_id: int, targets: dict[int, int]) -> None:
        """Copy final blocks; at the end go on, fail, or cancel."""
        answer = self.prefill.answers[handoff.prefill_id]
        if handoff.fails and self.rng.random() < 0.3:
            self._fail(handoff, source, decode_id, targets)
            return
        self._copy(handoff)
        if not answer.finished:
            return
        handoff.targets = None
        if answer.finish_reason:
            self.decode.absorb(self.decode.core.fetch_failed(decode_id))
        else:
            self.decode.absorb(self.decode.core.fetched(decode_id, (answer.token_ids[0],)))
        self.prefill.core.kv.release(source.ticket_id)

    def _copy(self, handoff: _Handoff) -> None:
        assert handoff.source is not None
        assert handoff.targets is not None
        source, targets = handoff.source, handoff.targets
        complete = handoff.num_final >= source.num_tokens
        num_final = len(source.source_blocks) if complete else handoff.num_final // 4
        for index in [i for i in targets if handoff.arrived <= i < num_final]:
            self.decode.device.write_block(targets[index], self.prefill.device.block(source.source_blocks[index]))
        handoff.arrived = num_final

    def _fail(self, handoff: _Handoff, source: HandoffScheduled, decode_id: int, targets: dict[int, int]) -> None:
        handoff.targets = None
        if self.rng.random() < 0.5:
            self.decode.absorb(self.decode.core.abort(decode_id))
        else:
            late = {b for b in targets.values() if self.rng.random() < 0.5}
            self.unsettled |= late
            self.decode.absorb(self.decode.core.fetch_failed(decode_id, late, TransferFailed("broken link")))
        self.prefill.absorb(self.prefill.core.abort(handoff.prefill_id))
        self.prefill.core.kv.release(source.ticket_id)

    def _on_prefill(self, event: CoreEvent) -> None:
        assert not isinstance(event, SaveReady)
        for handoff in self.handoffs:
            if handoff.prefill_id != event.sequence_id:
                continue
            if isinstance(event, HandoffScheduled):
                handoff.source = event
                handoff.num_final = event.num_cached_tokens
            elif isinstance(event, Computed):
                handoff.num_final = event.num_tokens

    def _on_decode(self, event: CoreEvent) -> None:
        if isinstance(event, FetchReady):
            (handoff,) = [h for h in self.handoffs if h.decode_id == event.sequence_id]
            handoff.targets = dict(event.fetch_blocks)
            for block_id in event.fetch_blocks.values():
                self._scribble(block_id)
            if self.rng.random() < 0.5:
                self._copy(handoff)
        elif isinstance(event, FetchAborted):
            self.unsettled |= set(event.block_ids)

    def _scribble(self, block_id: int) -> None:
        self.decode.device.write_block(block_id, [self.rng.getrandbits(32) for _ in range(4)])


@settings(max_examples=250, deadline=None)
@given(
    limits=st.tuples(engine_limits(), engine_limits()),
    asks=requests(max_prompt=13),
    blocks=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    chance=st.integers(0, 10**6),
)
def test_prefill_and_decode_engine_together_equal_the_oracle(
    limits: tuple[EngineLimits, EngineLimits], asks: list[Request], blocks: tuple[int, int], chance: int
) -> None:
    rng = Random(chance)
    pair = _Pair(rng, limits, blocks)
    pending = list(asks)
    for _ in range(MAX_MOVES):
        if pending and rng.random() < 0.1:
            pair.start(pending.pop(0))
        pair.move()
        if not pending and not pair.busy:
            break
    else:
        raise AssertionError("stuck")
    for handoff in pair.handoffs:
        assert_handed_over(pair, handoff)
    pair.prefill.assert_idle()
    pair.decode.assert_idle()


def assert_handed_over(pair: _Pair, handoff: _Handoff) -> None:
    first = pair.prefill.answers[handoff.prefill_id]
    assert handoff.decode_id is not None
    rest = pair.decode.answers[handoff.decode_id]
    tokens = (*first.token_ids, *rest.token_ids)
    expected, reason = oracle(handoff.request, pair.decode.core.max_len)
    if first.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        assert (tokens, first.finish_reason) == oracle(handoff.request, pair.prefill.core.max_len)
    elif rest.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        assert handoff.fails
        assert tokens == expected[: len(tokens)]
    else:
        assert (tokens, rest.finish_reason) == (expected, reason)
