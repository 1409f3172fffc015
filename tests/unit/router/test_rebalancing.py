"""What moves to even out load: from whom, to whom, and that it ends."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.cluster import Booked, BookedDecode, ClusterState, EngineKey, EngineView, StepModel
from pdserve.core.endpoint import EngineState, Role
from pdserve.router.rebalancing import DecodingRequest, Move, rebalance
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import BLOCK_SIZE, cluster, view

RULES = RoutingRules(rebalance=True)
STEEP = StepModel(base=1e-3, per_token=1e-3, per_context=1e-8)
FLAT = StepModel(base=5e-3, per_token=1e-6, per_context=1e-10)
PAUSE = 0.005
Loads = dict[str, list[DecodingRequest]]
"""By engine; whole blocks each, so that KV can be counted exactly."""


def rows(
    engine_id: str, count: int, *, expected: int = 256, context: int = 160, written: int = 0
) -> list[DecodingRequest]:
    row = BookedDecode(expected, context)
    return [DecodingRequest(f"{engine_id}/{number}", (engine_id, 1), row, written) for number in range(count)]


def state(loads: Loads, *, model: StepModel = STEEP, others: int = 0, blocks: int = 1024) -> ClusterState:
    return cluster(*(engine(name, runners, model, others, blocks) for name, runners in loads.items()), now=1.0)


def engine(name: str, runners: list[DecodingRequest], model: StepModel, others: int, blocks: int) -> EngineView:
    reserved = sum(runner.reserved for runner in runners)
    booked = Booked(decoding=tuple(runner.row for runner in runners), reserved_tokens=reserved)
    used = min(blocks, reserved // BLOCK_SIZE)
    return view(
        name, Role.DECODE, running=others, booked=booked, used=used, num_blocks=blocks, max_rows=32, step_model=model
    )


def decide(loads: Loads, seen: ClusterState | None = None, rules: RoutingRules = RULES) -> Move | None:
    runners = [runner for each in loads.values() for runner in each]
    return rebalance(runners, seen or state(loads), rules, PAUSE, since=-1.0)


def moved(loads: Loads, move: Move) -> Loads:
    """The loads after it."""
    target = move.target.engine_id
    [runner] = [runner for each in loads.values() for runner in each if runner.request_id == move.request_id]
    left = {name: [each for each in runners if each != runner] for name, runners in loads.items()}
    return left | {target: [*left[target], runner._replace(engine=(target, 1))]}


def source(loads: Loads, move: Move) -> str:
    [name] = [name for name, runners in loads.items() if move.request_id in {each.request_id for each in runners}]
    return name


def test_an_engine_with_many_rows_gives_one_up_to_an_idle_one() -> None:
    loads = {"d0": rows("d0", 12), "d1": []}
    move = decide(loads)
    assert move is not None
    assert (source(loads, move), move.target.engine_id) == ("d0", "d1")
    assert move.gain > 2 * move.cost
    assert "d0 under pressure" in move.why


def test_equal_loads_stay_where_they_are() -> None:
    assert decide({"d0": rows("d0", 12), "d1": rows("d1", 12)}) is None


def test_one_request_is_not_moved_from_engine_to_engine() -> None:
    assert decide({"d0": rows("d0", 1), "d1": []}) is None


def test_steps_that_rows_hardly_lengthen_are_no_reason() -> None:
    loads = {"d0": rows("d0", 12), "d1": []}
    assert decide(loads, state(loads, model=FLAT)) is None


def test_an_engine_short_of_kv_gives_one_up_even_then() -> None:
    loads = {"d0": rows("d0", 12), "d1": []}
    need = 12 * loads["d0"][0].reserved // BLOCK_SIZE
    assert decide(loads, state(loads, model=FLAT, blocks=need)) is not None
    assert decide(loads, state(loads, model=FLAT, blocks=need * 5 // 4)) is None


def test_rows_that_are_about_to_end_are_no_reason() -> None:
    loads = {"d0": rows("d0", 12, expected=1), "d1": []}
    assert decide(loads) is None


def test_the_cheapest_for_what_is_left_of_it_moves() -> None:
    dear, cheap, ending = rows("d0", 3)
    crowd = [runner._replace(request_id=f"c{n}", written=400) for n, runner in enumerate(rows("d0", 9))]
    dear = dear._replace(written=800)
    ending = ending._replace(row=BookedDecode(2, 160))
    move = decide({"d0": [dear, *crowd, ending, cheap], "d1": []})
    assert move is not None
    assert move.request_id == cheap.request_id


@pytest.mark.parametrize(
    "change",
    [
        lambda one: replace(one, endpoint=replace(one.endpoint, state=EngineState.SUSPECT)),
        lambda one: replace(one, load=replace(one.load, draining=True)),
        lambda one: replace(one, lost_links=frozenset({("d0", 1)})),
        lambda one: replace(one, capacity=None),
        lambda one: replace(one, load_at=-1.0),
        lambda one: replace(one, booked=replace(one.booked, reserved_tokens=15_000)),
    ],
    ids=["suspect", "draining", "lost link", "unknown", "not heard since", "no room"],
)
def test_nothing_goes_to_an_engine_that_should_not_get_it(change: object) -> None:
    loads = {"d0": rows("d0", 12), "d1": []}
    first, second = state(loads).engines
    assert decide(loads, cluster(first, second)) is not None
    assert decide(loads, cluster(first, change(second))) is None  # type: ignore[operator]


def test_a_dear_move_is_not_made() -> None:
    loads = {"d0": rows("d0", 12), "d1": []}
    first, second = state(loads).engines
    slow: dict[EngineKey, float] = {("d0", 1): 1.0}
    assert decide(loads, cluster(first, replace(second, fetch_speeds=slow))) is None


@pytest.mark.parametrize(("max_len", "wanted"), [(415, False), (416, True)])
def test_nothing_moves_where_it_would_have_to_end_sooner(max_len: int, wanted: bool) -> None:
    loads: Loads = {"d0": [runner._replace(longest=416) for runner in rows("d0", 12)], "d1": []}
    first, _ = state(loads).engines
    second = view("d1", Role.DECODE, max_rows=32, step_model=STEEP, max_len=max_len)
    assert (decide(loads, cluster(first, second, now=1.0)) is not None) is wanted


def test_a_move_that_would_call_others_back_is_not_made() -> None:
    """With the one that reads most, the second engine would be the one under pressure."""
    reads = StepModel(base=1e-3, per_token=1e-3, per_context=1e-5)
    for context, wanted in ((1600, False), (400, True)):
        large = DecodingRequest("large", ("d0", 1), BookedDecode(256, context), 0)
        loads = {"d0": [large, *rows("d0", 8, context=0)], "d1": rows("d1", 1, context=0)}
        move = rebalance([large], state(loads, model=reads), RULES, PAUSE, since=-1.0)
        assert (move is not None) is wanted


Blocks = st.integers(0, 16).map(lambda count: count * BLOCK_SIZE)
Rows = st.lists(st.tuples(Blocks, Blocks), max_size=24)
Many = st.lists(st.tuples(Blocks, Blocks), min_size=12, max_size=24)
Models = st.builds(StepModel, base=st.floats(1e-4, 1e-2), per_token=st.floats(0, 5e-3), per_context=st.floats(0, 1e-6))


@given(
    Many, st.lists(Rows, min_size=1, max_size=3), st.lists(Models, min_size=4), st.integers(0, 3), st.integers(80, 400)
)
def test_nothing_moves_back_and_moving_ends(
    first: list[tuple[int, int]], rest: list[list[tuple[int, int]]], models: list[StepModel], others: int, blocks: int
) -> None:
    drawn = [first, *rest]
    loads: Loads = {
        f"d{n}": [DecodingRequest(f"{n}/{i}", (f"d{n}", 1), BookedDecode(*row), 0) for i, row in enumerate(each)]
        for n, each in enumerate(drawn)
    }

    def seen() -> ClusterState:
        each = zip(loads.items(), models, strict=False)
        return cluster(*(engine(name, runners, model, others, blocks) for (name, runners), model in each))

    last: tuple[str, str] | None = None
    for _ in range(sum(map(len, drawn)) * len(drawn) + 1):
        move = decide(loads, seen())
        if move is None:
            return
        way = source(loads, move), move.target.engine_id
        assert last is None or way != last[::-1]
        loads, last = moved(loads, move), way
    pytest.fail("requests still move")


def test_nothing_moves_for_the_sake_of_load_to_an_engine_that_rounds_otherwise() -> None:
    loads: Loads = {"d0": rows("d0", 8), "d1": []}

    def decided(numerics: str) -> Move | None:
        views = state(loads).engines
        told = [
            replace(each, capacity=replace(each.capacity, numerics=numerics)) for each in views[1:] if each.capacity
        ]
        return decide(loads, cluster(views[0], *told, now=1.0))

    assert decided("")
    assert decided("b") is None
