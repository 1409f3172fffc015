"""What start-time fair queueing promises, on random requests."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pdserve.router.fair_queue import FairQueue

TENANTS = ("a", "b", "c")
Weights = st.fixed_dictionaries(dict.fromkeys(TENANTS, st.sampled_from([0.5, 1.0, 2.0, 4.0])))
Costs = st.floats(0.01, 1.0)
Asks = st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(-1, 1), Costs), min_size=1, max_size=60)


def serve_first(queue: FairQueue[int]) -> tuple[str, int, float]:
    head = queue.first()
    assert head is not None
    queue.leave(head)
    queue.serve(head.tenant, head.cost)
    return head.tenant, head.item, head.cost


@given(Weights, Asks)
def test_all_are_served_once_and_each_tenants_requests_of_a_priority_in_their_order(
    weights: dict[str, float], asks: list[tuple[str, int, float]]
) -> None:
    queue: FairQueue[int] = FairQueue(weights)
    for number, (tenant, priority, cost) in enumerate(asks):
        queue.push(number, tenant=tenant, priority=priority, cost=cost)
    assert queue.by_tenant() == Counter(tenant for tenant, _, _ in asks)
    served = []
    while len(queue):
        served.append(serve_first(queue)[1])
    assert sorted(served) == list(range(len(asks)))
    assert queue.first() is None
    priorities = [asks[number][1] for number in served]
    assert priorities == sorted(priorities), "the more urgent goes first"
    for tenant in TENANTS:
        for priority in (-1, 0, 1):
            own = [number for number in served if asks[number][:2] == (tenant, priority)]
            assert own == sorted(own)


@given(Weights, st.lists(st.tuples(Costs, Costs, Costs), min_size=40, max_size=40), st.integers(1, 100))
def test_while_all_have_something_waiting_each_gets_its_share(
    weights: dict[str, float], costs: list[tuple[float, float, float]], turns: int
) -> None:
    """The bound of the paper: over any stretch, work ÷ weight of two tenants differs by one request of each at most."""
    queue: FairQueue[int] = FairQueue(weights)
    for row in costs:
        for tenant, cost in zip(TENANTS, row, strict=True):
            queue.push(0, tenant=tenant, priority=0, cost=cost)
    done: Counter[str] = Counter()
    work = dict.fromkeys(TENANTS, 0.0)
    for _ in range(turns):
        tenant, _, cost = serve_first(queue)
        done[tenant] += 1
        work[tenant] += cost / weights[tenant]
        if max(done.values()) == len(costs):
            break  # the first has nothing left
        slack = {name: max(row[place] for row in costs) / weights[name] for place, name in enumerate(TENANTS)}
        for one in TENANTS:
            for other in TENANTS:
                assert work[one] - work[other] <= slack[one] + slack[other] + 1e-9


@given(Weights, Costs, st.integers(0, 200), st.floats(0, 2))
def test_nobody_starves_behind_a_flood(weights: dict[str, float], cost: float, served: int, credit: float) -> None:
    """Whoever comes into a flooded queue is served after one request of the other and its credit, however long the
    flood has lasted and goes on."""
    queue: FairQueue[int] = FairQueue(weights, credit)
    for number in range(served + 300):
        queue.push(number, tenant="a", priority=0, cost=cost)
    for _ in range(served):
        serve_first(queue)
    queue.push(-1, tenant="b", priority=0, cost=cost)
    before = 0.0
    while serve_first(queue)[1] != -1:
        before += cost
    assert before <= credit + cost + 1e-9


def test_no_claim_is_saved_up_by_not_asking_beyond_the_credit() -> None:
    queue: FairQueue[int] = FairQueue(credit=3.0)
    for _ in range(100):
        queue.serve("busy", 1.0)
    for number in range(20):
        queue.push(number, tenant="busy", priority=0, cost=1.0)
        queue.push(number, tenant="idle", priority=0, cost=1.0)
    first = [serve_first(queue)[0] for _ in range(20)]
    assert first[:3] == ["idle"] * 3
    assert abs(first[4:].count("idle") - first[4:].count("busy")) <= 2


def test_what_was_served_costs_more_than_foreseen() -> None:
    queue: FairQueue[int] = FairQueue({"a": 1.0, "b": 1.0})
    for _ in range(6):
        queue.push(0, tenant="a", priority=0, cost=1.0)
        queue.push(0, tenant="b", priority=0, cost=1.0)
    queue.correct("a", 3.0)
    assert [serve_first(queue)[0] for _ in range(4)] == ["b"] * 3 + ["a"]
    queue.correct("a", -100.0)
    assert serve_first(queue)[0] == "a", "and less"


@given(Weights, Asks, st.sampled_from(TENANTS), st.integers(-1, 1))
def test_what_is_ahead_is_what_is_served_first_if_nobody_else_comes(
    weights: dict[str, float], asks: list[tuple[str, int, float]], tenant: str, priority: int
) -> None:
    queue: FairQueue[int] = FairQueue(weights)
    for number, (name, urgency, cost) in enumerate(asks):
        queue.push(number, tenant=name, priority=urgency, cost=cost)
    ahead = queue.ahead(tenant, priority)
    queue.push(-1, tenant=tenant, priority=priority, cost=0.5)
    before, own = 0.0, 0
    while (served := serve_first(queue))[1] != -1:
        before += served[2]
        own += served[0] == tenant and asks[served[1]][1] == priority
    assert ahead.own == own
    # Tenants' tags move on while the more urgent are served, and of each tenant one request is cut in two.
    slack = len(TENANTS) * 1.0 + sum(cost for _, urgency, cost in asks if urgency < priority) * 8
    assert abs(ahead.cost - before) <= slack


@given(Asks, st.data())
def test_who_leaves_is_not_charged(asks: list[tuple[str, int, float]], data: st.DataObject) -> None:
    queue: FairQueue[int] = FairQueue()
    entries = [queue.push(n, tenant=t, priority=p, cost=c) for n, (t, p, c) in enumerate(asks)]
    leaving = data.draw(st.sets(st.sampled_from(entries)))
    for entry in leaving:
        queue.leave(entry)
    assert len(queue) == len(list(queue)) == len(asks) - len(leaving)
    twin: FairQueue[int] = FairQueue()
    for entry in entries:
        if entry not in leaving:
            twin.push(entry.item, tenant=entry.tenant, priority=entry.priority, cost=entry.cost)
    while len(queue):
        assert serve_first(queue)[1] == serve_first(twin)[1]
