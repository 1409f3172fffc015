"""A prompt's beginning that another engine holds: asked for once, behind what is here, and computed where it fails."""

import pytest

from pdserve.core.endpoint import EngineLimits
from pdserve.core.ticket import KVSource
from pdserve.engine.core_events import HandoffScheduled, RestoreReady
from tests.unit.engine.toy import ToyEngine, make_request, oracle

PROMPT = list(range(1, 19))
BLOCKS = len(PROMPT) // 4


def source(num_blocks: int = BLOCKS) -> KVSource:
    return KVSource(engine_id="d0", epoch=1, address="127.0.0.1:1", num_blocks=num_blocks)


class Pair:
    """An engine that has computed the prompt, and one that has not."""

    def __init__(self, *, prefix_caching: bool = True) -> None:
        self.lender, self.reader = ToyEngine(), ToyEngine(EngineLimits(prefix_caching=prefix_caching))
        self.lender.add(make_request("first", PROMPT))
        self.lender.run()
        self.restores: list[RestoreReady] = []
        self.reader.on_event = lambda e: self.restores.append(e) if isinstance(e, RestoreReady) else None

    def bring(self, event: RestoreReady, most: int = 10**6) -> None:
        blocks = self.lender.core.kv.lend(f"loan-{event.sequence_id}-{event.admission}", event.hashes)[:most]
        for theirs, ours in zip(blocks, event.blocks, strict=False):
            self.reader.device.write_block(ours, self.lender.device.block(theirs))
        self.reader.absorb(self.reader.core.restore_ended(event.sequence_id, event.admission, len(blocks)))

    def computed(self) -> int:
        return sum(row.num_tokens for batch in self.reader.batches for row in batch.rows)


def test_what_the_source_holds_is_not_computed() -> None:
    pair = Pair()
    request = make_request("second", PROMPT, max_tokens=1)
    number = pair.reader.add(request, source=source())
    pair.reader.run()
    (event,) = pair.restores
    assert (event.source, len(event.blocks)) == (source(), BLOCKS)
    pair.bring(event)
    pair.reader.run()
    assert tuple(pair.reader.answers[number].token_ids) == oracle(request)[0]
    assert pair.reader.answers[number].cached_tokens == 4 * BLOCKS
    assert pair.computed() == len(PROMPT) - 4 * BLOCKS
    pair.reader.assert_idle()


@pytest.mark.parametrize("arrived", range(BLOCKS))
def test_what_does_not_arrive_is_computed_and_nobody_is_asked_again(arrived: int) -> None:
    pair = Pair()
    request = make_request("second", PROMPT)
    number = pair.reader.add(request, source=source())
    pair.reader.run()
    pair.bring(pair.restores[0], most=arrived)
    pair.reader.run()
    assert tuple(pair.reader.answers[number].token_ids) == oracle(request)[0]
    assert len(pair.restores) == 1
    pair.reader.assert_idle()


def test_only_what_is_missing_is_asked_for_and_the_last_token_is_computed() -> None:
    pair = Pair()
    pair.reader.add(make_request("half", PROMPT[:9]))
    pair.reader.run()
    pair.reader.add(make_request("second", PROMPT[:16]), source=source())
    pair.reader.run()
    (event,) = pair.restores
    assert len(event.blocks) == 1, "two blocks are here, and of the fourth one token is left to compute"
    pair.bring(event)
    pair.reader.run()
    pair.reader.assert_idle()


def test_a_source_that_holds_no_more_than_is_here_is_not_asked() -> None:
    pair = Pair()
    pair.reader.add(make_request("first", PROMPT))
    pair.reader.run()
    pair.reader.add(make_request("second", PROMPT), source=source())
    pair.reader.run()
    assert not pair.restores
    pair.reader.assert_idle()


def test_without_prefix_caching_blocks_have_no_names_to_ask_for() -> None:
    pair = Pair(prefix_caching=False)
    request = make_request("second", PROMPT)
    number = pair.reader.add(request, source=source())
    pair.reader.run()
    assert not pair.restores
    assert tuple(pair.reader.answers[number].token_ids) == oracle(request)[0]


def test_a_late_source_is_not_waited_for_and_its_targets_are_quarantined() -> None:
    pair = Pair()
    request = make_request("second", PROMPT)
    number = pair.reader.add(request, source=source())
    pair.reader.run()
    (event,) = pair.restores
    pair.reader.core.restore_late(event.sequence_id, event.admission)
    pair.reader.run()
    assert tuple(pair.reader.answers[number].token_ids) == oracle(request)[0]
    assert pair.reader.core.kv.counts().quarantined == BLOCKS
    pair.bring(event)
    pair.reader.assert_idle()


def test_a_ticket_is_issued_when_the_source_has_answered() -> None:
    pair = Pair()
    number = pair.reader.add(make_request("second", PROMPT), handoff=True, source=source())
    pair.reader.run()
    assert not [e for e in pair.reader.events(number) if isinstance(e, HandoffScheduled)]
    pair.bring(pair.restores[0])
    pair.reader.run()
    (scheduled,) = [e for e in pair.reader.events(number) if isinstance(e, HandoffScheduled)]
    assert scheduled.num_cached_tokens == 4 * BLOCKS
    pair.reader.core.kv.release(scheduled.ticket_id)
    pair.reader.assert_idle()
