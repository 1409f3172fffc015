"""Composition of steps: order, budgets, two steps in flight, preemption, stopping."""

import pytest

from pdserve.core.batch import StepOutput, TokenSource
from pdserve.core.blocks import KVEventKind
from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import FinishReason
from tests.unit.engine.toy import ToyEngine, make_request, oracle


def prompt(length: int, start: int = 1) -> list[int]:
    return [start + i % 30 for i in range(length)]


def test_decodes_come_first_and_prompts_share_what_is_left_in_chunks() -> None:
    engine = ToyEngine(EngineLimits(max_tokens_per_step=16, chunk_size=8, depth=1))
    first = engine.add(make_request("a", prompt(5), ignore_eos=True))
    engine.submit()
    engine.collect()
    second = engine.add(make_request("b", prompt(20, 2)))
    third = engine.add(make_request("c", prompt(20, 3)))
    engine.submit()
    rows = [(row.sequence_id, row.num_tokens) for row in engine.batches[-1].rows]
    assert rows == [(first, 1), (second, 8), (third, 7)]


def test_no_more_sequences_are_admitted_than_rows() -> None:
    engine = ToyEngine(EngineLimits(max_rows=2))
    for name in "abc":
        engine.add(make_request(name, prompt(5)))
    engine.submit()
    load = engine.core.load()
    assert (load.running, load.waiting, load.backlog_tokens) == (2, 1, 5)
    engine.run()
    engine.assert_idle()


def test_block_tables_cover_exactly_the_tokens_of_the_row() -> None:
    engine = ToyEngine(EngineLimits(chunk_size=6, depth=1), block_size=4)
    engine.add(make_request("a", prompt(10)))
    engine.run()
    assert [len(batch.rows[0].block_ids) for batch in engine.batches[:3]] == [2, 3, 3]


def test_with_depth_two_the_next_step_is_submitted_before_the_last_token_is_known() -> None:
    engine = ToyEngine(EngineLimits(depth=2))
    engine.add(make_request("a", prompt(5), ignore_eos=True))
    assert engine.submit()
    assert engine.submit()
    assert engine.core.in_flight == 2
    assert engine.batches[1].rows[0].token_source is TokenSource.PREVIOUS_STEP
    assert engine.core.schedule() is None
    engine.run()
    assert all(row.token_source is TokenSource.PREVIOUS_STEP for b in engine.batches[1:] for row in b.rows)


def test_the_token_after_a_stop_is_discarded() -> None:
    request = make_request("a", prompt(5), max_tokens=150)
    expected, reason = oracle(request)
    assert reason is FinishReason.STOP, "the seed was chosen for this"
    engine = ToyEngine(EngineLimits(depth=2))
    sequence_id = engine.add(request)
    engine.run()
    answer = engine.answers[sequence_id]
    assert tuple(answer.token_ids) == expected
    assert answer.finish_reason is FinishReason.STOP
    assert len(engine.batches) == len(expected) + 1
    engine.assert_idle()


def test_no_step_is_wasted_when_the_length_is_known() -> None:
    engine = ToyEngine(EngineLimits(depth=2))
    engine.add(make_request("a", prompt(5), max_tokens=7, ignore_eos=True))
    engine.run()
    assert len(engine.batches) == 7


def test_the_context_limit_caps_the_answer() -> None:
    engine = ToyEngine(EngineLimits(max_model_len=20))
    request = make_request("a", prompt(15), max_tokens=100, ignore_eos=True)
    sequence_id = engine.add(request)
    engine.run()
    assert (tuple(engine.answers[sequence_id].token_ids), FinishReason.LENGTH) == oracle(request, max_len=20)
    assert len(engine.answers[sequence_id].token_ids) == 5


def test_a_pool_smaller_than_the_context_caps_the_answer_too() -> None:
    engine = ToyEngine(num_blocks=5, block_size=4)
    assert engine.core.max_len == 20
    sequence_id = engine.add(make_request("a", prompt(15), max_tokens=100, ignore_eos=True))
    engine.run()
    assert len(engine.answers[sequence_id].token_ids) == 5


def test_sampler_state_of_ended_sequences_is_dropped_with_the_next_step() -> None:
    engine = ToyEngine(EngineLimits(depth=1))
    ended = engine.add(make_request("a", prompt(5), max_tokens=1))
    engine.run()
    engine.add(make_request("b", prompt(5), max_tokens=1))
    engine.run()
    assert [batch.released for batch in engine.batches] == [(), (ended,)]


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back() -> None:
    engine = ToyEngine(EngineLimits(depth=1, prefix_caching=False), num_blocks=6, block_size=4)
    requests = [make_request(name, prompt(8, i + 1), max_tokens=8, ignore_eos=True) for i, name in enumerate("ab")]
    old, young = (engine.add(request) for request in requests)
    engine.run()
    names = [name for name, _ in engine.answers[young].stamps]
    assert "preempted" in names
    assert "resumed" in names
    assert names.count("prompt_computed") == 1
    assert "preempted" not in [name for name, _ in engine.answers[old].stamps]
    for sequence_id, request in zip((old, young), requests, strict=True):
        assert tuple(engine.answers[sequence_id].token_ids) == oracle(request)[0]
    engine.assert_idle()


def test_with_a_step_in_flight_one_victim_is_enough() -> None:
    engine = ToyEngine(EngineLimits(depth=2), num_blocks=9, block_size=4)
    ids = [engine.add(make_request(n, prompt(11, i), max_tokens=8, ignore_eos=True)) for i, n in enumerate("abc", 1)]
    engine.run()
    preempted = [[name for name, _ in engine.answers[i].stamps].count("preempted") for i in ids]
    assert preempted == [0, 0, 1]
    engine.assert_idle()


def preempt_behind_a_step_in_flight(chunk_size: int) -> tuple[ToyEngine, int]:
    """A sequence whose row is in flight when it is preempted; then a lease ends, and it would fit again."""
    engine = ToyEngine(EngineLimits(depth=2, chunk_size=chunk_size), num_blocks=12, block_size=4)
    engine.add(make_request("lease", prompt(24)), handoff=True)
    engine.run()
    engine.core.kv.drain_events()
    engine.add(make_request("a", prompt(8, 7), max_tokens=8, ignore_eos=True))
    young = engine.add(make_request("b", prompt(16, 2), max_tokens=8, ignore_eos=True))
    assert engine.submit()
    assert not engine.submit()
    assert engine.core.load().waiting == 1
    assert engine.core.kv.release("ticket-0")
    return engine, young


def test_a_preempted_sequence_waits_for_its_token_in_flight() -> None:
    engine, young = preempt_behind_a_step_in_flight(chunk_size=16)
    assert engine.batches[-1].rows[-1].sample
    assert engine.submit()
    assert engine.core.load().waiting == 1
    engine.run()
    request = make_request("b", prompt(16, 2), max_tokens=8, ignore_eos=True)
    assert tuple(engine.answers[young].token_ids) == oracle(request)[0]
    engine.assert_idle()


def test_a_chunk_of_a_life_before_the_preemption_proves_nothing_about_the_new_blocks() -> None:
    engine, young = preempt_behind_a_step_in_flight(chunk_size=8)
    assert engine.submit()
    assert [row.sequence_id for row in engine.batches[-1].rows].count(young) == 1, "it computes anew already"
    engine.collect()
    (stored,) = [event for event in engine.core.kv.drain_events() if event.kind is KVEventKind.STORED]
    assert len(stored.hashes) == 2, "only the older sequence's blocks are final"
    engine.run()
    engine.assert_idle()


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    engine = ToyEngine(EngineLimits(depth=1), num_blocks=8, block_size=4)
    first = engine.add(make_request("a", prompt(20), max_tokens=4, ignore_eos=True))
    engine.submit()
    large = engine.add(make_request("b", prompt(24, 2), max_tokens=2))
    small = engine.add(make_request("c", prompt(3, 3), max_tokens=2))
    engine.run()
    order = [row.sequence_id for batch in engine.batches for row in batch.rows]
    assert order.index(first) < order.index(large) < order.index(small)
    engine.assert_idle()


def test_a_full_prefix_hit_recomputes_only_the_last_block() -> None:
    engine = ToyEngine(block_size=4)
    request = make_request("a", prompt(12))
    engine.add(request)
    engine.run()
    engine.batches.clear()
    again = engine.add(request)
    engine.run()
    row = engine.batches[0].rows[0]
    assert (row.start, row.num_tokens) == (8, 4)
    assert engine.answers[again].cached_tokens == 8
    assert tuple(engine.answers[again].token_ids) == oracle(request)[0]


def test_other_salts_do_not_see_the_cache() -> None:
    engine = ToyEngine()
    engine.add(make_request("a", prompt(12), salt=b"one"))
    engine.run()
    other = engine.add(make_request("b", prompt(12), salt=b"two"))
    engine.run()
    assert engine.answers[other].cached_tokens == 0


def test_the_next_turn_hits_the_answer_too() -> None:
    engine = ToyEngine(block_size=4)
    first = engine.add(make_request("a", prompt(6), max_tokens=10, ignore_eos=True))
    engine.run()
    turn = engine.add(make_request("b", [*prompt(6), *engine.answers[first].token_ids, 5]))
    engine.run()
    assert engine.answers[turn].cached_tokens == 12


def test_stamps_tell_the_life_of_a_sequence() -> None:
    engine = ToyEngine(EngineLimits(chunk_size=4))
    sequence_id = engine.add(make_request("a", prompt(10), max_tokens=3, ignore_eos=True))
    engine.run()
    names = [name for name, _ in engine.answers[sequence_id].stamps]
    assert names == ["queued", "scheduled", "prompt_computed", "first_token", "finished"]


def test_results_out_of_order_or_of_other_sequences_are_refused() -> None:
    engine = ToyEngine(EngineLimits(depth=2))
    engine.add(make_request("a", prompt(5), ignore_eos=True))
    engine.submit()
    engine.submit()
    with pytest.raises(ValueError, match="step 1 completed"):
        engine.core.complete(StepOutput(step=1, rows=()))
    with pytest.raises(ValueError, match="step 0 has no output for sequence 0"):
        engine.core.complete(StepOutput(step=0, rows=()))


def test_other_limits_hold_from_the_next_step_on_and_change_no_token() -> None:
    requests = [
        make_request(name, prompt(40, start), max_tokens=20, ignore_eos=True) for start, name in enumerate("abc", 1)
    ]
    engine = ToyEngine(EngineLimits(max_tokens_per_step=48, chunk_size=16, max_rows=8, depth=1))
    ids = [engine.add(request) for request in requests]
    engine.submit()
    engine.collect()
    engine.core.limit(EngineLimits(max_tokens_per_step=8, chunk_size=4, max_rows=8, depth=2, prefix_caching=False))
    engine.submit()
    assert sum(row.num_tokens for row in engine.batches[0].rows) == 48
    assert sum(row.num_tokens for row in engine.batches[1].rows) == 8
    assert (engine.core.limits.depth, engine.core.limits.prefix_caching) == (1, True)
    engine.run()
    for sequence_id, request in zip(ids, requests, strict=True):
        assert tuple(engine.answers[sequence_id].token_ids) == oracle(request)[0]
