"""The decode side: KV that arrives merely raises num_computed_tokens; KV that fails harms nobody."""

import pytest

from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import TransferTimeout
from pdserve.core.request import FinishReason, Request
from pdserve.engine.core_events import Emitted, FetchAborted, FetchReady, Finished
from tests.unit.engine.tickets import make_ticket
from tests.unit.engine.toy import ToyEngine, kv_value, make_request, oracle

PROMPT = list(range(1, 11))


def make_decode(*, num_blocks: int = 32, max_rows: int = 8) -> ToyEngine:
    return ToyEngine(EngineLimits(depth=2, max_rows=max_rows), num_blocks=num_blocks, block_size=4)


def add_fetch(engine: ToyEngine, request: Request) -> int:
    return engine.add(request, ticket=make_ticket(request, block_size=4))


def ready(engine: ToyEngine, sequence_id: int) -> FetchReady:
    (event,) = [e for e in engine.events(sequence_id) if isinstance(e, FetchReady)]
    return event


def arrive(engine: ToyEngine, event: FetchReady, prompt: list[int]) -> None:
    """Write the prompt's true KV into the target blocks."""
    values: list[int] = []
    for token in prompt:
        values.append(kv_value(values, token))
    values += [0] * (-len(values) % 4)
    for index, block_id in event.fetch_blocks.items():
        engine.device.write_block(block_id, values[index * 4 : index * 4 + 4])


def test_a_fetched_sequence_goes_on_from_the_first_token_without_computing_the_prompt() -> None:
    engine = make_decode()
    request = make_request("a", PROMPT)
    expected, reason = oracle(request)
    sequence_id = add_fetch(engine, request)
    assert not engine.advance()
    assert (engine.core.load().waiting, engine.core.load().fetching) == (1, 1)
    event = ready(engine, sequence_id)
    assert sorted(event.fetch_blocks) == [0, 1, 2]
    arrive(engine, event, PROMPT)
    engine.absorb(engine.core.fetched(sequence_id, (expected[0],)))
    engine.run()
    answer = engine.answers[sequence_id]
    assert (answer.first_index, tuple(answer.token_ids), answer.finish_reason) == (1, expected[1:], reason)
    assert all(row.num_tokens == 1 for batch in engine.batches for row in batch.rows)
    assert [name for name, _ in answer.stamps] == ["queued", "fetching", "fetched", "finished"]
    engine.assert_idle()


def test_wrong_kv_changes_the_tokens() -> None:
    """The control that gives the other tests their meaning."""
    engine = make_decode()
    request = make_request("a", PROMPT, ignore_eos=True)
    sequence_id = add_fetch(engine, request)
    engine.advance()
    event = ready(engine, sequence_id)
    arrive(engine, event, PROMPT)
    engine.device.write_block(event.fetch_blocks[0], engine.device.block(event.fetch_blocks[1]))
    engine.absorb(engine.core.fetched(sequence_id, (oracle(request)[0][0],)))
    engine.run()
    assert tuple(engine.answers[sequence_id].token_ids) != oracle(request)[0][1:]


def test_locally_cached_blocks_are_not_fetched_and_fetched_ones_are_cached() -> None:
    engine = make_decode()
    engine.add(make_request("a", PROMPT[:5]))
    engine.run()
    longer = add_fetch(engine, make_request("b", PROMPT))
    engine.advance()
    event = ready(engine, longer)
    assert sorted(event.fetch_blocks) == [1, 2]
    arrive(engine, event, PROMPT)
    engine.absorb(engine.core.fetched(longer, (7,)))
    engine.run()
    again = add_fetch(engine, make_request("c", PROMPT))
    engine.advance()
    assert sorted(ready(engine, again).fetch_blocks) == [2]


def test_fetched_blocks_are_hits_as_soon_as_they_are_verified() -> None:
    engine = make_decode()
    first = add_fetch(engine, make_request("a", PROMPT))
    engine.advance()
    arrive(engine, ready(engine, first), PROMPT)
    engine.absorb(engine.core.fetched(first, (7,)))
    second = add_fetch(engine, make_request("b", PROMPT))
    engine.submit()
    assert sorted(ready(engine, second).fetch_blocks) == [2]


def test_blocks_are_allocated_for_the_prompt_and_its_first_token() -> None:
    engine = make_decode()
    sequence_id = add_fetch(engine, make_request("a", PROMPT[:8]))
    engine.advance()
    assert sorted(ready(engine, sequence_id).fetch_blocks) == [0, 1]
    assert engine.core.kv.counts().used == 3


def test_fetching_sequences_take_their_share_of_the_rows() -> None:
    engine = make_decode(max_rows=1)
    first, second = (add_fetch(engine, make_request(name, PROMPT)) for name in "ab")
    engine.advance()
    assert ready(engine, first)
    assert engine.events(second) == []


@pytest.mark.parametrize("ending", ["stop", "cancel"])
def test_a_row_in_flight_of_a_sequence_that_gave_up_its_blocks_cannot_overwrite_fetched_kv(ending: str) -> None:
    engine = make_decode(num_blocks=4)
    stops = oracle(make_request("a", [2] * 13, ignore_eos=True))[0][0]
    old = engine.add(make_request("a", [2] * 13, ignore_eos=True, stop_token_ids=(stops,) if ending == "stop" else ()))
    engine.submit()
    engine.submit()
    if ending == "stop":
        engine.collect()
    else:
        engine.absorb(engine.core.abort(old))
    request = make_request("b", PROMPT, max_tokens=4, ignore_eos=True)
    sequence_id = add_fetch(engine, request)
    for _ in range(4):
        engine.submit()
        if engine.events(sequence_id):
            break
        engine.collect()
    arrive(engine, ready(engine, sequence_id), PROMPT)
    while engine.core.in_flight:
        engine.collect()
    engine.absorb(engine.core.fetched(sequence_id, (oracle(request)[0][0],)))
    engine.run()
    assert tuple(engine.answers[sequence_id].token_ids) == oracle(request)[0][1:]


def test_a_prompt_of_whole_cached_blocks_needs_no_fetch() -> None:
    engine = make_decode()
    request = make_request("a", PROMPT[:8])
    engine.add(request)
    engine.run()
    sequence_id = add_fetch(engine, request)
    engine.advance()
    assert ready(engine, sequence_id).fetch_blocks == {}
    expected = oracle(request)[0]
    engine.absorb(engine.core.fetched(sequence_id, (expected[0],)))
    engine.run()
    assert tuple(engine.answers[sequence_id].token_ids) == expected[1:]


def test_unverified_blocks_are_no_hits() -> None:
    engine = make_decode()
    first = add_fetch(engine, make_request("a", PROMPT))
    engine.advance()
    second = add_fetch(engine, make_request("b", PROMPT))
    engine.advance()
    assert not set(ready(engine, first).fetch_blocks.values()) & set(ready(engine, second).fetch_blocks.values())


def test_a_failed_fetch_quarantines_what_may_still_be_written_and_frees_the_rest() -> None:
    engine = make_decode(num_blocks=4)
    sequence_id = add_fetch(engine, make_request("a", PROMPT))
    engine.advance()
    targets = ready(engine, sequence_id).fetch_blocks
    error = TransferTimeout("the pull took longer than 10 s")
    engine.absorb(engine.core.fetch_failed(sequence_id, {targets[1]}, error))
    assert engine.answers[sequence_id].error == ("transfer_timeout", "the pull took longer than 10 s")
    counts = engine.core.kv.counts()
    assert (counts.free, counts.quarantined) == (3, 1)
    waiting = engine.add(make_request("b", [5] * 14, max_tokens=1))
    engine.run()
    assert not engine.answers[waiting].finished, "the quarantined block is missing"
    engine.core.kv.unquarantine([targets[1]])
    engine.run()
    assert engine.answers[waiting].finished
    engine.assert_idle()


def test_cancelling_a_fetch_quarantines_its_targets_until_they_settle() -> None:
    engine = make_decode()
    sequence_id = add_fetch(engine, make_request("a", PROMPT))
    engine.advance()
    targets = tuple(ready(engine, sequence_id).fetch_blocks.values())
    engine.absorb(engine.core.abort(sequence_id))
    aborted = engine.events(sequence_id)[-3:]
    assert aborted[0] == FetchAborted(sequence_id=sequence_id, block_ids=targets)
    assert [type(event) for event in aborted] == [FetchAborted, Emitted, Finished]
    assert engine.core.kv.counts().quarantined == 3
    assert engine.core.fetched(sequence_id, (5,)) == []
    assert engine.core.fetch_failed(sequence_id, set(targets), None) == []
    engine.core.kv.unquarantine(targets[:2])
    engine.core.kv.unquarantine(targets[2:])
    engine.assert_idle()


def test_a_fetch_that_ended_on_the_source_leaves_no_error() -> None:
    engine = make_decode()
    sequence_id = add_fetch(engine, make_request("a", PROMPT))
    engine.advance()
    engine.absorb(engine.core.fetch_failed(sequence_id))
    assert engine.answers[sequence_id].finish_reason is FinishReason.CANCELLED
    engine.assert_idle()


def test_a_ticket_can_fail_while_it_still_waits_for_blocks() -> None:
    engine = make_decode(max_rows=1)
    engine.add(make_request("a", PROMPT, max_tokens=30, ignore_eos=True))
    engine.advance()
    sequence_id = add_fetch(engine, make_request("b", PROMPT))
    engine.advance()
    engine.absorb(engine.core.fetch_failed(sequence_id, (), TransferTimeout("the source is silent")))
    assert engine.answers[sequence_id].finish_reason is FinishReason.ERROR
    engine.run()
    engine.assert_idle()


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_first_token_that_ends_the_request_ends_it_here_too(max_tokens: int) -> None:
    engine = make_decode()
    request = make_request("a", PROMPT, max_tokens=max_tokens, stop_token_ids=(9,))
    sequence_id = add_fetch(engine, request)
    engine.advance()
    arrive(engine, ready(engine, sequence_id), PROMPT)
    engine.absorb(engine.core.fetched(sequence_id, (9 if max_tokens > 1 else 8,)))
    answer = engine.answers[sequence_id]
    assert answer.finished
    assert answer.token_ids == []
    assert answer.finish_reason is (FinishReason.STOP if max_tokens > 1 else FinishReason.LENGTH)
    engine.assert_idle()


def test_tickets_wait_in_order_for_blocks_and_the_others_keep_running() -> None:
    engine = make_decode(num_blocks=6)
    runner = engine.add(make_request("a", PROMPT, max_tokens=6, ignore_eos=True))
    engine.submit()
    large = add_fetch(engine, make_request("b", [3] * 15))
    small = add_fetch(engine, make_request("c", [4] * 3))
    engine.run()
    assert engine.answers[runner].finished
    order = [e.sequence_id for e in engine.log if isinstance(e, FetchReady)]
    assert order == [large, small]


def test_a_preempted_fetched_sequence_recomputes_and_goes_on() -> None:
    engine = make_decode(num_blocks=6)
    requests = [make_request(name, [i] * 8, max_tokens=8, ignore_eos=True) for i, name in enumerate("ab", 1)]
    ids = [add_fetch(engine, request) for request in requests]
    engine.advance()
    for sequence_id, request in zip(ids, requests, strict=True):
        arrive(engine, ready(engine, sequence_id), list(request.prompt_token_ids))
        engine.absorb(engine.core.fetched(sequence_id, (oracle(request)[0][0],)))
    engine.run()
    for sequence_id, request in zip(ids, requests, strict=True):
        assert tuple(engine.answers[sequence_id].token_ids) == oracle(request)[0][1:]
    assert "preempted" in [name for name, _ in engine.answers[ids[1]].stamps]
    engine.assert_idle()
