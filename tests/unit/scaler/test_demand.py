"""What reports become where they meet."""

from pdserve.scaler.demand import MOST_SAMPLES, Demand, FirstToken, bounded, one_after_another


def report(number: int) -> Demand:
    """One that is full."""
    samples = tuple(float(number) for _ in range(MOST_SAMPLES))
    firsts = tuple(FirstToken(seconds=float(number), own=0.0) for _ in range(MOST_SAMPLES))
    return Demand(seconds=1.0, arrivals=MOST_SAMPLES, first_tokens=firsts, handoff_gaps=samples, tpots=samples)


def test_what_nobody_has_heard_grows_no_longer_than_one_report_may_be() -> None:
    unheard: Demand | None = None
    for number in range(10):
        together = one_after_another([*([unheard] if unheard else []), report(number)])
        assert together
        unheard = bounded(together)
    assert unheard
    assert (unheard.seconds, unheard.arrivals) == (10.0, 10 * MOST_SAMPLES)
    assert unheard.tpots == unheard.handoff_gaps == report(9).tpots
    assert unheard.first_tokens == report(9).first_tokens
