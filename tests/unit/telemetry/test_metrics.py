"""Every metric is exported under its name, and two sets of metrics do not meet."""

from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineState, LoadSnapshot, Role
from pdserve.telemetry.metrics import Metrics


def view(free: int) -> EngineView:
    endpoint = Endpoint(
        engine_id="decode-0", role=Role.DECODE, epoch=1, address="localhost:1", pid=1, state=EngineState.SUSPECT
    )
    blocks = BlockCounts(total=10, free=free, used=10 - free, leased=0, quarantined=0)
    load = LoadSnapshot(
        engine_id="decode-0", epoch=1, number=1, running=1, waiting=0, backlog_tokens=9, blocks=blocks, draining=False
    )
    return EngineView(endpoint=endpoint, load=load)


def test_engine_gauges_show_the_state_at_the_time_of_the_scrape() -> None:
    metrics, views = Metrics(), [view(free=7)]
    metrics.watch_engines(lambda: views)
    assert metrics.registry.get_sample_value("pdserve_kv_blocks", {"engine": "decode-0", "state": "free"}) == 7
    views[0] = view(free=2)
    assert metrics.registry.get_sample_value("pdserve_kv_blocks", {"engine": "decode-0", "state": "free"}) == 2
    views.clear()
    assert metrics.registry.get_sample_value("pdserve_kv_blocks", {"engine": "decode-0", "state": "free"}) is None


def test_states_of_blocks_sum_up_to_all_blocks() -> None:
    metrics = Metrics()
    metrics.watch_engines(lambda: [view(free=7)])
    samples = [
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "pdserve_kv_blocks"
    ]
    assert sum(samples) == 10


def test_metrics_of_two_servers_in_one_process_are_apart() -> None:
    one, two = Metrics(), Metrics()
    one.output_tokens.inc(3)
    assert one.registry.get_sample_value("pdserve_output_tokens_total") == 3
    assert two.registry.get_sample_value("pdserve_output_tokens_total") == 0


def test_names_carry_the_prefix_and_no_colon() -> None:
    lines = Metrics().exposition().decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {
        "pdserve_time_to_first_token_seconds",
        "pdserve_inter_token_latency_seconds",
        "pdserve_e2e_request_latency_seconds",
        "pdserve_handoff_gap_seconds",
        "pdserve_requests_total",
        "pdserve_rejections_total",
    } <= names
    assert all(name.startswith("pdserve_") and ":" not in name for name in names)
