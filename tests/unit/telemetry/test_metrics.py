"""Every metric is exported under its name, and two sets of metrics do not meet."""

from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.admission import Admission, Rejection, Usage
from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineCapacity, EngineState, LoadSnapshot, Role
from pdserve.core.errors import DigestMismatch
from pdserve.telemetry.index_metrics import IndexSizes
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.metrics_table import document
from pdserve.telemetry.scaler_metrics import PoolFigures, ScalerFigures
from tests.unit.telemetry.records import START, disaggregated, fetching, moved, replayed, route


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


def test_vllm_names_show_the_same_figures() -> None:
    metrics = Metrics()
    capacity = EngineCapacity(model_revision="r", block_size=16, num_blocks=10, max_rows=1, max_tokens_per_step=1)
    metrics.name_as_vllm("m", lambda: [replace(view(free=7), capacity=capacity)])
    metrics.time_to_first_token.observe(0.3)
    metrics.count(disaggregated())
    value = metrics.registry.get_sample_value
    model, engine = {"model_name": "m"}, {"model_name": "m", "engine": "decode-0"}
    for ours, theirs in (
        ("pdserve_time_to_first_token_seconds_count", "vllm:time_to_first_token_seconds_count"),
        ("pdserve_prompt_tokens_total", "vllm:prompt_tokens_total"),
        ("pdserve_output_tokens_total", "vllm:generation_tokens_total"),
        ("pdserve_decode_seconds_sum", "vllm:request_decode_time_seconds_sum"),
    ):
        assert value(theirs, model) == value(ours)
        assert value(ours)
    assert value("vllm:time_to_first_token_seconds_bucket", {**model, "le": "0.3"}) == 1
    assert value("vllm:num_requests_running", engine) == 1
    assert value("vllm:kv_cache_usage_perc", engine) == pytest.approx(0.3)
    assert value("vllm:cache_config_info", {**engine, "block_size": "16", "num_gpu_blocks": "10"}) == 1
    assert b"# TYPE vllm:time_to_first_token_seconds histogram" in metrics.exposition()


def test_lost_links_are_those_of_decode_engines() -> None:
    metrics, parted = Metrics(), replace(view(free=7), lost_links=frozenset({("prefill-0", 1), ("prefill-1", 1)}))
    metrics.watch_engines(lambda: [parted])
    assert metrics.registry.get_sample_value("pdserve_lost_links", {"engine": "decode-0"}) == 2


def test_ways_of_rounding_are_counted_where_engines_promise_any() -> None:
    capacity = EngineCapacity(model_revision="r", block_size=4, num_blocks=8, max_rows=1, max_tokens_per_step=8)
    metrics = Metrics()
    views = [replace(view(free=7), capacity=replace(capacity, numerics=numerics)) for numerics in ("", "a", "b", "b")]
    metrics.watch_engines(lambda: [view(free=7), *views])
    assert metrics.registry.get_sample_value("pdserve_numerics") == 2


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


def test_a_request_counts_by_stage_and_transfer() -> None:
    metrics = Metrics()
    metrics.count(disaggregated())
    value = metrics.registry.get_sample_value
    for stage, seconds in (("queue", 0.005), ("prefill", 0.020), ("transfer", 0.019), ("decode", 0.054)):
        assert value(f"pdserve_{stage}_seconds_sum") == pytest.approx(seconds)
    assert value("pdserve_handoff_gap_seconds_sum") == pytest.approx(0.014)
    assert value("pdserve_transfers_total", {"backend": "shared_memory", "result": "ok"}) == 1
    assert value("pdserve_transferred_bytes_total", {"backend": "shared_memory"}) == 4096
    for stage, seconds in (("queue", 0.001), ("post", 0.002), ("wire", 0.003), ("verify", 0.004)):
        assert value(f"pdserve_transfer_{stage}_seconds_sum") == pytest.approx(seconds)
    assert value("pdserve_transfer_modes_total", {"mode": "progressive"}) == 1
    assert value("pdserve_transfer_failovers_total", {"backend": "nixl", "cause": "transfer_failed"}) == 1
    assert value("pdserve_requests_total", {"endpoint": "completions", "status": "ok"}) == 1
    assert value("pdserve_output_tokens_total") == 12


def test_what_was_tried_again_counts_by_reason_and_a_failed_transfer_by_its_error() -> None:
    metrics, record = Metrics(), disaggregated()
    record.give_up(DigestMismatch("bytes differ"), emitted_tokens=1, unix=START)
    record.route, record.decode_trace = route(), disaggregated().decode_trace
    metrics.count(record)
    metrics.count(replayed())
    value = metrics.registry.get_sample_value
    assert value("pdserve_replays_total", {"reason": "digest_mismatch"}) == 1
    assert value("pdserve_replays_total", {"reason": "engine_died"}) == 1
    assert value("pdserve_transfers_total", {"backend": "shared_memory", "result": "digest_mismatch"}) == 1
    assert value("pdserve_transfers_total", {"backend": "shared_memory", "result": "ok"}) == 2


def test_the_documented_table_is_that_of_the_code() -> None:
    documented = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert documented.read_text(encoding="utf-8") == document(), "run `make metrics-table`"


def test_what_the_index_knows_is_read_at_every_scrape() -> None:
    metrics, sizes = Metrics(), [IndexSizes(announced=5, expected=2, forgotten=0)]
    metrics.watch_index(lambda: sizes[-1])
    assert 'pdserve_kv_index_blocks{kind="announced"} 5.0' in metrics.exposition().decode()
    sizes.append(IndexSizes(announced=4, expected=0, forgotten=1))
    text = metrics.exposition().decode()
    assert 'pdserve_kv_index_blocks{kind="announced"} 4.0' in text
    assert 'pdserve_kv_index_blocks{kind="expected"} 0.0' in text
    assert "pdserve_kv_index_forgotten_total 1.0" in text


def test_what_the_scaler_has_told_is_read_at_every_scrape_and_nothing_before_it_has() -> None:
    metrics, told = Metrics(), list[ScalerFigures]()
    metrics.watch_scaler(lambda: told[-1] if told else None)
    assert "pdserve_scaler" not in metrics.exposition().decode()
    pool = PoolFigures(role="prefill", wanted=3, ready=2, warming=1, need=2.5, pressure=1.25)
    told.append(ScalerFigures(pools=(pool,), decisions=(("scale", "ttft", 4),), reloads=(("ok", 1),), bypass_below=256))
    value = metrics.registry.get_sample_value
    assert value("pdserve_scaler_engines", {"role": "prefill", "kind": "wanted"}) == 3
    assert value("pdserve_scaler_needed_engines", {"role": "prefill"}) == 2.5
    assert value("pdserve_scaler_pressure", {"role": "prefill"}) == 1.25
    assert value("pdserve_scaler_decisions_total", {"speed": "scale", "rule": "ttft"}) == 4
    assert value("pdserve_scaler_policy_reloads_total", {"result": "ok"}) == 1
    assert (value("pdserve_scaler_bypass_below_tokens"), value("pdserve_scaler_dry_run")) == (256, 0)


def test_the_table_has_every_exported_metric() -> None:
    metrics = Metrics()
    metrics.watch_engines(lambda: [view(free=1)])
    metrics.watch_index(lambda: IndexSizes(1, 2, 3))
    metrics.watch_waiting(dict)
    metrics.routers.watch(lambda: True, lambda: 0)
    metrics.watch_scaler(ScalerFigures)
    exported = {line.split()[2] for line in metrics.exposition().decode().splitlines() if line.startswith("# TYPE")}
    described = {description.name for description in metrics.described}
    assert described == {name for name in exported if not name.endswith("_created")}


def test_fetches_of_a_prompts_beginning_count_by_result_and_only_what_arrived_counts_as_fetched() -> None:
    metrics = Metrics()
    metrics.count(fetching())
    metrics.count(fetching(0, "transfer_timeout"))
    value = metrics.registry.get_sample_value
    assert value("pdserve_prefix_fetches_total", {"result": "ok"}) == 1
    assert value("pdserve_prefix_fetches_total", {"result": "transfer_timeout"}) == 1
    assert value("pdserve_prefix_fetched_tokens_total") == 48
    assert value("pdserve_prefix_fetch_seconds_sum") == pytest.approx(0.004)


def test_moves_count_by_outcome_and_those_that_came_about_with_their_pause_and_bytes() -> None:
    metrics = Metrics()
    metrics.count(moved())
    value = metrics.registry.get_sample_value
    assert value("pdserve_migrations_total", {"outcome": "ok", "reason": "rebalance"}) == 1
    assert value("pdserve_migrations_total", {"outcome": "transfer_failed", "reason": "drain"}) == 1
    assert value("pdserve_migration_pause_seconds_count") == 1
    assert value("pdserve_migration_pause_seconds_sum") == 0.004
    assert value("pdserve_transferred_bytes_total", {"backend": "nixl"}) == 4096


def test_admission_is_counted_by_tenant() -> None:
    metrics, waiting = Metrics(), {"search": 3}
    metrics.watch_waiting(lambda: waiting)
    value = metrics.registry.get_sample_value
    assert value("pdserve_admission_waiting_requests", {"tenant": "search"}) == 3
    foreseen = Admission(tenant="search", priority=0, predicted_wait=0.1, predicted_ttft=0.2, ttft_target=1.0)
    usage = Usage(prefill_seconds=0.5, kv_block_seconds=7.0, link_bytes=4096)
    for admission, used in (
        (replace(foreseen, waited=0.3), usage),
        (replace(foreseen, rejection=Rejection.TTFT), None),
        (replace(foreseen, waited=2.0, rejection=Rejection.DEADLINE), None),
    ):
        metrics.count(replace(disaggregated(), admission=admission, usage=used))
    assert value("pdserve_admission_wait_seconds_sum") == pytest.approx(0.3)
    for reason in ("ttft", "deadline"):
        assert value("pdserve_admission_rejections_total", {"tenant": "search", "reason": reason}) == 1
    assert value("pdserve_tenant_prefill_seconds_total", {"tenant": "search"}) == 0.5
    assert value("pdserve_tenant_kv_block_seconds_total", {"tenant": "search"}) == 7
    assert value("pdserve_tenant_link_bytes_total", {"tenant": "search"}) == 4096
