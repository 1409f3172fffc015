"""Who leaves a full tier: those that came once before those that came back, and of a chain its end first."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.tiers.eviction import SegmentedLRU
from tests.unit.tiers.blocks import name


def leave(order: SegmentedLRU) -> bytes:
    victim = order.victim(lambda key: True)
    assert victim is not None
    order.remove(victim)
    return victim


def test_prompts_that_come_once_never_push_out_what_came_back() -> None:
    order = SegmentedLRU(10)
    for key in range(8):
        order.add(name(key))
    order.use([name(3), name(4)])
    for stranger in range(100, 200):
        leave(order)
        order.add(name(stranger))
    assert {name(3), name(4)} <= set(order)


def test_what_came_back_cannot_take_everything() -> None:
    """The newest block has its chance however many others are in use."""
    order = SegmentedLRU(10)
    for key in range(10):
        order.add(name(key))
        order.use([name(key)])
    assert [leave(order) for _ in range(2)] == [name(0), name(1)]
    order.add(name(10))
    order.add(name(11))
    assert leave(order) == name(10)


def test_of_a_chain_in_use_the_end_leaves_first() -> None:
    order = SegmentedLRU(3)
    chain = [name(key) for key in range(3)]
    for key in reversed(chain):
        order.add(key)
    order.use(chain)
    assert [leave(order) for _ in range(3)] == chain[::-1]


def test_only_those_that_may_leave_do() -> None:
    order = SegmentedLRU(4)
    for key in range(3):
        order.add(name(key))
    assert order.victim(lambda key: key != name(0)) == name(1)
    assert order.victim(lambda key: False) is None
    assert len(order) == 3


@given(st.lists(st.tuples(st.sampled_from(["add", "use", "remove"]), st.integers(0, 9))), st.integers(1, 8))
def test_every_key_is_held_exactly_once_until_removed(moves: list[tuple[str, int]], capacity: int) -> None:
    order, held = SegmentedLRU(capacity), set[bytes]()
    for move, number in moves:
        key = name(number)
        if move == "add" and key not in held:
            order.add(key)
            held.add(key)
        elif move == "use" and key in held:
            order.use([key])
        elif move == "remove":
            order.remove(key)
            held.discard(key)
        assert sorted(order) == sorted(held)
        assert len(order) == len(held)
