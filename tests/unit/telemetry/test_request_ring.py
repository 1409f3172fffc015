"""The ring finds a request by every name its client may know, and never holds more than it should."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.request_ring import RequestRing


def record(request_id: str, client_id: str = "") -> RequestRecord:
    return RequestRecord(request_id=request_id, client_id=client_id)


def test_a_request_is_found_by_its_id_its_bare_id_and_its_clients_id() -> None:
    ring = RequestRing(4)
    kept = record("chatcmpl-77", "my-own")
    ring.add(kept)
    ring.add(record("chatcmpl-78"))
    assert all(ring.find(name) is kept for name in ("chatcmpl-77", "77", "my-own"))
    assert ring.find("chatcmpl") is None


def test_last_is_the_latest_to_arrive() -> None:
    ring = RequestRing(2)
    assert ring.find("last") is None
    for number in range(5):
        ring.add(record(f"cmpl-{number}"))
    last = ring.find("last")
    assert last is not None
    assert last.request_id == "cmpl-4"


def test_the_latest_come_in_order_of_arrival() -> None:
    ring = RequestRing(3)
    for number in range(5):
        ring.add(record(f"cmpl-{number}"))
    assert [kept.request_id for kept in ring.latest(2)] == ["cmpl-3", "cmpl-4"]
    assert len(ring.latest(99)) == 3


def test_of_two_requests_with_one_client_id_the_later_answers_until_it_is_forgotten() -> None:
    ring = RequestRing(2)
    first, second = record("cmpl-1", "same"), record("cmpl-2", "same")
    ring.add(first)
    ring.add(second)
    assert ring.find("same") is second
    ring.add(record("cmpl-3"))
    assert ring.find("1") is None
    assert ring.find("same") is second
    ring.add(record("cmpl-4"))
    assert ring.find("same") is None


@given(
    capacity=st.integers(1, 5),
    arrivals=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["", "a", "b"])), max_size=40),
)
def test_exactly_the_latest_are_kept_and_no_name_of_another_lingers(
    capacity: int, arrivals: list[tuple[int, str]]
) -> None:
    ring = RequestRing(capacity)
    records = [record(f"cmpl-{place}x{number}", name) for place, (number, name) in enumerate(arrivals)]
    for one in records:
        ring.add(one)
    kept = records[-capacity:]
    assert len(ring) == len(kept)
    for one in records:
        assert (ring.find(one.request_id) is one) == (one in kept)
    for name in ("a", "b"):
        latest = next((one for one in reversed(kept) if one.client_id == name), None)
        assert ring.find(name) is latest
