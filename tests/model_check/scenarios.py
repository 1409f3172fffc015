"""One interleaving for every mutant in which it breaks a promise, found by search.py and cut down to what matters.

They rest on how long messages and steps take. When a change of the protocol moves those, search.py finds others.
"""

from collections.abc import Callable

from tests.model_check.machine import HandoffMachine

Scenario = Callable[[HandoffMachine], None]


def no_quarantine_after_failure(happens: HandoffMachine) -> None:
    """The reads outlive the fetch's deadline."""
    happens.begin(prefill="p0", decode="d1", held=True)
    happens.time_passes(seconds=0.6)


def no_quarantine_after_cancel(happens: HandoffMachine) -> None:
    """The client leaves while reads are in flight, and they end later."""
    happens.begin(prefill="p1", decode="d1", held=True)
    happens.time_passes(seconds=0.1)
    happens.cancel(index=0, at_source=False)


def settled_too_early(happens: HandoffMachine) -> None:
    """As no_quarantine_after_failure, but quarantine begins and ends too soon."""
    happens.begin(prefill="p0", decode="d0", held=True)
    happens.time_passes(seconds=0.1)


def settled_twice(happens: HandoffMachine) -> None:
    """A fetch fails on an offer made twice while one of its reads is in flight."""
    happens.begin(prefill="p0", decode="d1", held=True)
    happens.time_passes(seconds=0.1)
    happens.line_breaks(index=0)
    happens.read_fails(index=0)


def lease_released_twice(happens: HandoffMachine) -> None:
    """The target dies, so the lease ends by itself."""
    happens.begin(prefill="p1", decode="d1", held=False)
    happens.kill(engine_id="d1", restarted=False)


def no_lease_guard(happens: HandoffMachine) -> None:
    """A region becomes ready while its target is frozen, and the lease ends before it thaws."""
    happens.begin(prefill="p1", decode="d1", held=True)
    happens.time_passes(seconds=0.03)
    happens.time_passes(seconds=0.03)
    happens.freeze(engine_id="d1")
    happens.time_passes(seconds=0.6)
    happens.freeze(engine_id="p1")
    happens.time_passes(seconds=3.5)


def lease_counted_from_arrival(happens: HandoffMachine) -> None:
    """Renewals get lost on the way, twice."""
    happens.begin(prefill="p1", decode="d0", held=False)
    happens.time_passes(seconds=0.03)
    happens.cancel(index=0, at_source=False)
    happens.renewals_get_lost(index=0)
    happens.time_passes(seconds=0.03)
    happens.time_passes(seconds=0.03)
    happens.renewals_get_lost(index=0)
    happens.time_passes(seconds=0.03)
    happens.time_passes(seconds=1.9)


def cancel_frees_under_a_reader(happens: HandoffMachine) -> None:
    """The prompt is cancelled at its source while a target reads the first blocks of it."""
    happens.begin(prefill="p1", decode="d1", held=False)
    happens.submit(first=3, length=7, max_tokens=2, prefill="p1", decode="d1", late=False)
    happens.submit(first=1, length=5, max_tokens=3, prefill="p0", decode="d0", late=False)
    happens.time_passes(seconds=0.03)
    happens.cancel(index=0, at_source=True)


def digests_not_compared(happens: HandoffMachine) -> None:
    """A read delivers a wrong byte."""
    happens.begin(prefill="p1", decode="d1", held=True)
    happens.time_passes(seconds=0.1)
    happens.read_ends(index=0, damaged=True)
    happens.let_reads_go(index=0)


def runs_before_everything_arrived(happens: HandoffMachine) -> None:
    """The first token is there before the last read has ended."""
    happens.begin(prefill="p0", decode="d0", held=False)
    happens.time_passes(seconds=0.03)


def lends_without_a_lease(happens: HandoffMachine) -> None:
    """The next turn is asked of an engine that reads the history from another one's cache."""
    happens.begin(prefill="p0", decode="d0", held=False)
    happens.time_passes(seconds=0.6)
    happens.go_on(index=0, where=("p1", "d1"), handoff=False, question=1, stalled=False)
    happens.time_passes(seconds=0.1)


def a_fetch_given_up_is_forgotten(happens: HandoffMachine) -> None:
    """As before, but the reads outlive the fetch."""
    happens.begin(prefill="p0", decode="d0", held=False)
    happens.time_passes(seconds=0.6)
    happens.go_on(index=0, where=("p1", "d1"), handoff=False, question=1, stalled=True)
    happens.time_passes(seconds=1.9)


def growth_not_leased(happens: HandoffMachine) -> None:
    """A sequence leaves a second time, its first target being gone, and fills blocks until the second caught up."""
    happens.begin(prefill="p1", decode="d1", held=True)
    happens.submit_and_migrate(prefill="p0", decode="d0", to="d1", after=0.4)
    happens.kill(engine_id="d1", restarted=True)
    happens.migrate(index=7, to="d1", late=False)


def growth_offered_too_early(happens: HandoffMachine) -> None:
    """Two sequences leave, each twice."""
    happens.begin(prefill="p0", decode="d0", held=False)
    happens.submit_and_migrate(prefill="p0", decode="d1", to="d1", after=0.4)
    happens.migrate(index=0, to="d0", late=False)
    happens.submit_and_migrate(prefill="p1", decode="d1", to="d1", after=0.2)
    happens.migrate(index=15, to="d0", late=False)


def goes_on_after_handing_over(happens: HandoffMachine) -> None:
    """Nothing is in the way of a migration."""
    happens.begin(prefill="p1", decode="d1", held=False)
    happens.submit_and_migrate(prefill="p0", decode="d0", to="d1", after=0.2)
    happens.time_passes(seconds=0.6)


def preempted_while_leaving(happens: HandoffMachine) -> None:
    """A leaving sequence shares its engine with older ones that still grow, its target being frozen."""
    happens.begin(prefill="p0", decode="d1", held=True)
    happens.submit_and_migrate(prefill="p0", decode="d1", to="d1", after=0.6)
    happens.read_fails(index=3)
    happens.read_ends(index=0, damaged=False)
    happens.time_passes(seconds=0.03)
    happens.time_passes(seconds=0.03)
    happens.freeze(engine_id="d0")
    happens.let_reads_go(index=0)
    happens.time_passes(seconds=0.03)
    happens.migrate(index=0, to="d0", late=False)
    happens.submit_and_migrate(prefill="p1", decode="d1", to="d0", after=0.2)
    happens.time_passes(seconds=1.9)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        no_quarantine_after_failure,
        no_quarantine_after_cancel,
        settled_too_early,
        settled_twice,
        lease_released_twice,
        no_lease_guard,
        lease_counted_from_arrival,
        cancel_frees_under_a_reader,
        digests_not_compared,
        runs_before_everything_arrived,
        lends_without_a_lease,
        a_fetch_given_up_is_forgotten,
        growth_not_leased,
        growth_offered_too_early,
        goes_on_after_handing_over,
        preempted_while_leaving,
    )
}
"""By the name of the mutant."""
