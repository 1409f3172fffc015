"""KV from a tier merely raises num_computed_tokens; what is late, damaged or gone is computed.

The toy tiers copy a block out at the last moment they may and write garbage into targets until the last moment
they may, so any block in two hands at once shows up as a wrong token.
"""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.blocks import BlockHash
from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import FinishReason, Request
from pdserve.core.ticket import KVSource
from pdserve.core.tiers import Tier, TierNews
from pdserve.engine.core_events import CoreEvent, HandoffScheduled, RestoreReady, SaveReady
from pdserve.kvcache.tier_index import TierIndex
from tests.unit.engine.test_same_tokens import MAX_MOVES, assert_answer, engine_limits, requests
from tests.unit.engine.toy import ToyEngine, make_request, oracle

PROMPT = list(range(1, 14))
SOURCE = KVSource(engine_id="d0", epoch=1, address="127.0.0.1:1", num_blocks=3)
"""In these tests it has what the tiers have, but is not known to."""


class Tiers:
    """A tier that remembers everything, and answers when it is told to."""

    def __init__(self, *, num_blocks: int, limits: EngineLimits | None = None) -> None:
        self.index = TierIndex()
        self.engine = ToyEngine(limits, num_blocks=num_blocks, block_size=4, tiers=self.index)
        self.engine.on_event = self._on_event
        self.held: dict[BlockHash, list[int]] = {}
        self.saves: list[SaveReady] = []
        self.restores: list[RestoreReady] = []

    def copy_out(self, event: SaveReady) -> None:
        self.saves.remove(event)
        for block_hash, block in event.blocks:
            self.held[block_hash] = self.engine.device.block(block)
            self.tell(block_hash, Tier.HOST)
        self.engine.core.kv.saved([block for _, block in event.blocks])

    def tell(self, block_hash: BlockHash, tier: Tier | None) -> None:
        self.engine.core.kv.hear(TierNews(changes=((block_hash, tier),), tallies=()))

    def bring(self, event: RestoreReady, most: int = 10**6) -> None:
        """Fill the targets as far as the tier can, and say so."""
        self.restores.remove(event)
        count = 0
        for block_hash, block in list(zip(event.hashes, event.blocks, strict=True))[:most]:
            if block_hash not in self.held:
                self.tell(block_hash, None)
                break
            self.engine.device.write_block(block, self.held[block_hash])
            count += 1
        self.engine.absorb(self.engine.core.restore_ended(event.sequence_id, event.admission, count))

    def _on_event(self, event: CoreEvent) -> None:
        if isinstance(event, SaveReady):
            self.saves.append(event)
        elif isinstance(event, RestoreReady):
            self.restores.append(event)

    def run(self) -> None:
        """Until idle, answering at once."""
        for _ in range(500):
            if self.saves:
                self.copy_out(self.saves[0])
            elif self.restores:
                self.bring(self.restores[0])
            elif not self.engine.advance() and not self.saves and not self.restores:
                return
        raise AssertionError("stuck")

    def answer(self, request: Request, *, handoff: bool = False) -> int:
        sequence_id = self.engine.add(request, handoff=handoff)
        self.run()
        return sequence_id

    def flush_device(self) -> None:
        """Let another prompt take every block of the pool."""
        total = self.engine.core.kv.num_blocks
        self.answer(make_request("flush", [30] * (total * 4 - 1), salt=b"z", max_tokens=1))


def rows(tiers: Tiers, sequence_id: int) -> int:
    return sum(row.num_tokens for b in tiers.engine.batches for row in b.rows if row.sequence_id == sequence_id)


def test_a_prompt_that_left_the_pool_comes_back_without_being_computed() -> None:
    tiers = Tiers(num_blocks=8)
    request = make_request("a", PROMPT, max_tokens=1)
    tiers.answer(request)
    tiers.flush_device()
    again = tiers.answer(make_request("b", PROMPT, max_tokens=1))
    answer = tiers.engine.answers[again]
    assert (tuple(answer.token_ids), answer.finish_reason) == oracle(request)
    assert answer.cached_tokens == 12
    assert rows(tiers, again) == 1
    assert [stamp for stamp, _ in answer.stamps][:4] == ["queued", "scheduled", "restoring", "restored"]
    tiers.engine.assert_idle()


def test_wrong_bytes_from_a_tier_change_the_tokens() -> None:
    """The control that gives the other tests their meaning."""
    tiers = Tiers(num_blocks=8)
    request = make_request("a", PROMPT, ignore_eos=True)
    tiers.answer(request)
    tiers.flush_device()
    for block_hash in tiers.held:
        tiers.held[block_hash] = [1, 2, 3, 4]
    again = tiers.answer(make_request("b", PROMPT, ignore_eos=True))
    assert tuple(tiers.engine.answers[again].token_ids) != oracle(request)[0]


@pytest.mark.parametrize("verified", [0, 1, 2, 3])
def test_what_does_not_verify_is_computed(verified: int) -> None:
    tiers = Tiers(num_blocks=8)
    request = make_request("a", PROMPT)
    tiers.answer(request)
    tiers.flush_device()
    again = tiers.engine.add(make_request("b", PROMPT))
    tiers.engine.submit()
    (event,) = tiers.restores
    for block in event.blocks:
        tiers.engine.device.write_block(block, [7, 7, 7, 7])
    tiers.bring(event, most=verified)
    tiers.run()
    answer = tiers.engine.answers[again]
    assert (tuple(answer.token_ids), answer.finish_reason) == oracle(request)
    assert answer.cached_tokens == 4 * verified
    tiers.engine.assert_idle()


def test_others_compute_while_a_restore_runs() -> None:
    tiers = Tiers(num_blocks=16)
    tiers.answer(make_request("a", PROMPT))
    tiers.flush_device()
    tiers.engine.add(make_request("b", PROMPT))
    tiers.engine.submit()
    (event,) = tiers.restores
    other = tiers.engine.add(make_request("c", [9, 9, 9]))
    tiers.engine.run()
    assert tiers.engine.answers[other].finished
    tiers.bring(event)
    tiers.run()
    tiers.engine.assert_idle()


def test_a_late_restore_is_computed_elsewhere_and_its_targets_wait_in_quarantine() -> None:
    tiers = Tiers(num_blocks=16)
    request = make_request("a", PROMPT)
    tiers.answer(request)
    tiers.flush_device()
    again = tiers.engine.add(make_request("b", PROMPT))
    tiers.engine.submit()
    (event,) = tiers.restores
    tiers.engine.core.restore_late(event.sequence_id, event.admission)
    tiers.engine.core.restore_late(event.sequence_id, event.admission)
    assert tiers.engine.core.kv.counts().quarantined == 3
    tiers.engine.run()
    answer = tiers.engine.answers[again]
    assert (tuple(answer.token_ids), answer.finish_reason) == oracle(request)
    assert answer.cached_tokens == 0
    assert tiers.engine.core.kv.counts().quarantined == 3
    tiers.bring(event)
    tiers.run()
    tiers.engine.assert_idle()


def test_a_cancelled_restore_gives_its_targets_back_when_it_has_ended() -> None:
    tiers = Tiers(num_blocks=8)
    tiers.answer(make_request("a", PROMPT))
    tiers.flush_device()
    again = tiers.engine.add(make_request("b", PROMPT))
    tiers.engine.submit()
    (event,) = tiers.restores
    tiers.engine.absorb(tiers.engine.core.abort(again))
    assert tiers.engine.core.kv.counts().quarantined == 3
    tiers.bring(event)
    tiers.engine.assert_idle()


def test_a_prefill_engine_issues_its_ticket_when_the_restore_has_ended() -> None:
    tiers = Tiers(num_blocks=8)
    tiers.answer(make_request("a", PROMPT))
    tiers.flush_device()
    sequence_id = tiers.answer(make_request("b", PROMPT), handoff=True)
    (scheduled,) = [e for e in tiers.engine.events(sequence_id) if isinstance(e, HandoffScheduled)]
    assert scheduled.num_cached_tokens == 12
    assert tiers.engine.core.kv.release(scheduled.ticket_id)
    tiers.engine.assert_idle()


def test_blocks_being_copied_out_are_not_handed_out() -> None:
    tiers = Tiers(num_blocks=8)
    tiers.engine.add(make_request("a", PROMPT, max_tokens=1))
    tiers.engine.run()
    assert tiers.engine.core.kv.counts().leased == 3
    large = tiers.engine.add(make_request("b", [30] * 27, max_tokens=1))
    tiers.engine.run()
    assert not tiers.engine.answers[large].finished
    while tiers.saves:
        tiers.copy_out(tiers.saves[0])
    tiers.run()
    assert tiers.engine.answers[large].finished
    tiers.engine.assert_idle()


@settings(max_examples=250, deadline=None)
@given(
    limits=engine_limits(), asks=requests(max_prompt=15), extra_blocks=st.integers(0, 8), chance=st.integers(0, 10**6)
)
def test_an_engine_with_hostile_tiers_and_sources_equals_the_oracle(
    limits: EngineLimits, asks: list[Request], extra_blocks: int, chance: int
) -> None:
    rng = Random(chance)
    tiers = Tiers(num_blocks=4 + extra_blocks, limits=limits)
    engine, pending, aborted = tiers.engine, list(asks), set[int]()
    ids: dict[str, int] = {}
    for _ in range(MAX_MOVES):
        move = rng.random()
        if pending and move < 0.1:
            request = pending.pop(0)
            ids[request.id] = engine.add(request, source=rng.choice([None, SOURCE]))
        elif ids and move < 0.12:
            aborted.add(victim := rng.choice(list(ids.values())))
            engine.absorb(engine.core.abort(victim))
        elif tiers.saves and move < 0.25:
            tiers.copy_out(rng.choice(tiers.saves))
        elif tiers.restores and move < 0.4:
            hostile_restore(tiers, rng)
        elif tiers.held and move < 0.42:
            del tiers.held[rng.choice(sorted(tiers.held))]
        elif move < 0.7:
            engine.submit()
        elif engine.core.in_flight:
            engine.collect()
        if not (pending or engine.core.has_work or tiers.saves or tiers.restores):
            break
    else:
        raise AssertionError("stuck")
    for request in asks:
        assert_answer(engine, ids[request.id], request, ids[request.id] in aborted)
    engine.assert_idle()


def hostile_restore(tiers: Tiers, rng: Random) -> None:
    event = rng.choice(tiers.restores)
    move = rng.random()
    if move < 0.3:
        block = rng.choice(event.blocks)
        tiers.engine.device.write_block(block, [rng.getrandbits(32) for _ in range(4)])
    elif move < 0.45:
        tiers.engine.core.restore_late(event.sequence_id, event.admission)
    else:
        tiers.bring(event, most=rng.choice([0, 1, 10**6]))


def test_finish_reasons_of_the_oracle_are_reached() -> None:
    """The requests above end in both ways."""
    assert {oracle(make_request("a", [n], max_tokens=20))[1] for n in range(1, 30)} == {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }
