"""What a replay submits, whom a loss is blamed on, and when trying again ends."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.cluster import Mode, Route
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import (
    DigestMismatch,
    EngineDied,
    EngineSilent,
    InvalidRequest,
    LinkLost,
    Overloaded,
    PdserveError,
    TransferFailed,
    TransferTimeout,
    Unavailable,
)
from pdserve.core.request import Request, SamplingParams
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.replay import (
    Lost,
    ReplayBudget,
    ReplayHistory,
    ReplayRules,
    continuation,
    lost,
    rebased,
)
from tests.clocks import ManualClock, settle
from tests.unit.router.views import view


def endpoint(engine_id: str, role: Role) -> Endpoint:
    return Endpoint(engine_id=engine_id, role=role, epoch=9, address="", pid=1, state=EngineState.READY)


P, D = endpoint("p0", Role.PREFILL), endpoint("d0", Role.DECODE)
ROUTE = Route(mode=Mode.DISAGGREGATED, prefill=P, decode=D, reason="")


@given(
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=20),
    emitted=st.lists(st.integers(0, 99), max_size=9),
    min_tokens=st.integers(0, 10),
    attempt=st.integers(1, 3),
)
def test_a_continuation_asks_for_exactly_what_is_missing(
    prompt: list[int], emitted: list[int], min_tokens: int, attempt: int
) -> None:
    sampling = SamplingParams(max_tokens=10, min_tokens=min_tokens, seed=4, temperature=0.5)
    request = Request(id="r", prompt_token_ids=tuple(prompt), sampling=sampling, salt=b"tenant")
    share = continuation(request, emitted, attempt)
    assert share.prompt_token_ids == (*prompt, *emitted)
    assert share.sampling.max_tokens == 10 - len(emitted)
    assert share.sampling.min_tokens == max(0, min_tokens - len(emitted))
    assert (share.sampling.seed, share.sampling.temperature, share.salt) == (4, 0.5, b"tenant")
    assert share.id != request.id
    assert continuation(request, [], 0) is request


def test_a_continuations_deltas_take_their_place_in_the_whole_answer() -> None:
    delta = rebased(TokenDelta(request_id="r~1", index=2, token_ids=(5,)), "r", 7)
    assert (delta.request_id, delta.index, delta.token_ids) == ("r", 9, (5,))


@pytest.mark.parametrize(
    ("error", "reporter", "blamed", "died"),
    [
        (EngineDied("gone"), P, P, True),
        (EngineDied("gone"), D, D, True),
        (EngineSilent("for 3 s"), D, D, False),
        (LinkLost("silent"), D, P, False),
        (DigestMismatch("damaged"), D, P, False),
        (Unavailable("draining"), D, D, False),
        (Unavailable("draining"), P, P, False),
    ],
)
def test_a_loss_is_blamed_on_the_engine_that_failed(
    error: PdserveError, reporter: Endpoint, blamed: Endpoint, died: bool
) -> None:
    loss = lost(error, reporter, ROUTE)
    assert loss is not None
    assert (loss.engine, loss.died) == (blamed, died)


def test_what_another_attempt_cannot_mend_is_no_loss() -> None:
    assert lost(InvalidRequest("too long", "prompt"), D, ROUTE) is None


def test_lost_incarnations_are_avoided_and_attempts_are_counted() -> None:
    history = ReplayHistory(ReplayRules(max_attempts=3))
    history.note(Lost(LinkLost("silent"), P, died=False))
    history.note(Lost(Unavailable("draining"), D, died=False))
    assert history.excluded == {("p0", 9), ("d0", 9)}
    assert history.parted([view("p1", Role.PREFILL)]) == frozenset()
    with pytest.raises(LinkLost):
        history.note(Lost(LinkLost("silent"), endpoint("p1", Role.PREFILL), died=False))


def test_after_a_lost_link_its_target_may_serve_alone_and_after_a_second_one_handoffs_are_over() -> None:
    history = ReplayHistory(ReplayRules(max_attempts=5))
    engines = [view(name, Role.PREFILL, epoch=9) for name in ("p0", "p1")] + [view("d0", Role.DECODE, epoch=9)]
    for source, parted in (("p0", {("p0", 9), ("d0", 9)}), ("p1", {engine.key for engine in engines})):
        loss = lost(LinkLost("silent"), D, replace(ROUTE, prefill=endpoint(source, Role.PREFILL)))
        assert loss is not None
        history.note(loss)
        assert history.parted(engines) == parted
    assert history.excluded == {("p0", 9), ("p1", 9)}, "the sources, which may be dead"


@pytest.mark.parametrize("error", [LinkLost("silent"), TransferFailed("refused"), TransferTimeout("10 s")])
def test_only_what_a_decode_engine_says_of_its_link_is_a_lost_link(error: PdserveError) -> None:
    said = [lost(error, D, ROUTE), lost(error, P, ROUTE), lost(DigestMismatch("damaged"), D, ROUTE)]
    assert [loss and loss.link for loss in said] == [ROUTE.link, None, None]
    assert [loss and loss.damaging for loss in said] == [None, None, ROUTE.link]


def test_a_request_present_at_two_deaths_is_not_given_a_third_engine() -> None:
    history = ReplayHistory(ReplayRules(max_attempts=5, poison_deaths=2))
    history.note(Lost(EngineDied("gone"), P, died=True))
    with pytest.raises(EngineDied, match="2 engines died while they served this request"):
        history.note(Lost(EngineDied("gone"), D, died=True))


def test_a_request_whose_engines_fell_silent_is_tried_again() -> None:
    history = ReplayHistory(ReplayRules(max_attempts=5, poison_deaths=2))
    for engine in (P, D, P):
        loss = lost(EngineSilent("for 3 s"), engine, ROUTE)
        assert loss is not None
        history.note(loss)
    assert history.deaths == 0


async def test_replays_beyond_the_burst_wait_their_turn() -> None:
    clock = ManualClock()
    budget = ReplayBudget(ReplayRules(rate=2.0, burst=3, patience=1.0), clock)
    for _ in range(3):
        await budget.admit()
    fourth = asyncio.create_task(budget.admit())
    fifth = asyncio.create_task(budget.admit())
    await settle()
    assert not fourth.done()
    with pytest.raises(Overloaded) as refused:
        await budget.admit()
    assert refused.value.retry_after > 1.0
    await clock.advance(0.5)
    assert fourth.done()
    assert not fifth.done()
    await clock.advance(0.5)
    assert fifth.done()
