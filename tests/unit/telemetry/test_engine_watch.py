"""Restarts and silences are counted once each, and nothing else is."""

from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import BlockCounts, EngineState, LoadSnapshot
from pdserve.telemetry.engine_watch import EngineWatch
from pdserve.telemetry.metrics import Metrics
from tests.unit.telemetry.records import endpoint

READY, SUSPECT, DEAD, STARTING = EngineState.READY, EngineState.SUSPECT, EngineState.DEAD, EngineState.STARTING


def counts(*states: tuple[int, EngineState]) -> tuple[float | None, float | None]:
    """(restarts, silences) of decode-0 after these (epoch, state) in turn."""
    metrics = Metrics()
    watch = EngineWatch(metrics)
    for epoch, state in states:
        watch.update((endpoint("decode-0", epoch, state),))
    names = "pdserve_engine_restarts_total", "pdserve_late_heartbeats_total"
    restarts, silences = (metrics.registry.get_sample_value(name, {"engine": "decode-0"}) for name in names)
    return restarts, silences


def test_an_engine_that_starts_and_serves_counts_nothing() -> None:
    assert counts((1, STARTING), (1, READY), (1, READY), (1, EngineState.DRAINING)) == (None, None)


def test_a_new_epoch_of_a_known_engine_is_a_restart() -> None:
    assert counts((1, READY), (1, DEAD), (2, STARTING), (2, READY), (3, STARTING)) == (2, None)


def test_a_silence_counts_once_however_often_it_is_reported() -> None:
    assert counts((1, READY), (1, SUSPECT), (1, SUSPECT), (1, READY), (1, SUSPECT)) == (None, 2)


def test_a_gateway_that_meets_a_silent_engine_first_has_not_seen_it_fall_silent() -> None:
    assert counts((1, SUSPECT), (1, DEAD), (2, STARTING)) == (1, None)


def test_an_incarnation_that_gives_up_its_memory_counts_once() -> None:
    metrics = Metrics()
    watch = EngineWatch(metrics)
    for epoch, cause in ((1, ""), (1, "quarantine"), (1, "quarantine"), (2, ""), (3, "quarantine")):
        load = LoadSnapshot(
            engine_id="decode-0",
            epoch=epoch,
            number=1,
            running=0,
            waiting=0,
            backlog_tokens=0,
            blocks=BlockCounts(total=8, free=0, used=0, leased=0, quarantined=8),
            draining=bool(cause),
            drain_cause=cause,
        )
        watch.draining([EngineView(endpoint=endpoint("decode-0", epoch), load=load)])
    assert metrics.registry.get_sample_value("pdserve_quarantine_drains_total", {"engine": "decode-0"}) == 2
