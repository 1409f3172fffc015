"""Alerts fire on what they are for and on nothing else; rules and dashboard read what pdserve exports."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.core.errors import PdserveError
from pdserve.telemetry.metrics import Description, Metrics
from pdserve.telemetry.scaler_metrics import LEADER
from tests.chart.promtool import promtool, try_rules
from tests.chart.rules import alerts, expressions, metrics_in, selectors_in

END = 30
"""Minutes of every scenario."""
HEALTHY = {
    "pdserve_numerics": "1x30",
    'pdserve_engine_info{engine="p-0",role="prefill",state="ready"}': "1x30",
    'pdserve_engine_info{engine="d-0",role="decode",state="ready"}': "1x30",
    'pdserve_engine_restarts_total{engine="d-0"}': "1x30",
    'pdserve_late_heartbeats_total{engine="d-0"}': "1x30",
    'pdserve_requests_total{endpoint="chat",status="ok"}': "0+600x30",
    'pdserve_requests_total{endpoint="chat",status="engine_died"}': "0+1x30",
    'pdserve_admission_rejections_total{tenant="default",reason="ttft"}': "0+6x30",
    'pdserve_time_to_first_token_seconds_bucket{le="0.5"}': "0+600x30",
    'pdserve_time_to_first_token_seconds_bucket{le="30"}': "0+601x30",
    'pdserve_time_to_first_token_seconds_bucket{le="+Inf"}': "0+601x30",
    'pdserve_inter_token_latency_seconds_bucket{le="0.05"}': "0+600x30",
    'pdserve_inter_token_latency_seconds_bucket{le="5"}': "0+601x30",
    'pdserve_inter_token_latency_seconds_bucket{le="+Inf"}': "0+601x30",
    'pdserve_handoff_gap_seconds_bucket{le="0.05"}': "0+600x30",
    'pdserve_handoff_gap_seconds_bucket{le="5"}': "0+601x30",
    'pdserve_handoff_gap_seconds_bucket{le="+Inf"}': "0+601x30",
    'pdserve_kv_blocks{engine="d-0",state="free"}': "20x30",
    'pdserve_kv_blocks{engine="d-0",state="used"}': "70x30",
    'pdserve_kv_blocks{engine="d-0",state="leased"}': "5x30",
    'pdserve_kv_blocks{engine="d-0",state="quarantined"}': "5x30",
    'pdserve_lost_links{engine="d-0"}': "0x30",
    'pdserve_transfers_total{backend="nixl",result="ok"}': "0+600x30",
    'pdserve_transfers_total{backend="nixl",result="link_lost"}': "0+1x30",
    'pdserve_transfers_total{backend="nixl",result="digest_mismatch"}': "0x30",
    'pdserve_kv_tier_errors_total{engine="d-0",tier="disk",cause="io"}': "0x30",
    'pdserve_policy_errors_total{error="KeyError"}': "0x30",
    "pdserve_redis_up": "1x30",
    'pdserve_scaler_leader{pod="s-0"}': "1x30",
    'pdserve_scaler_leader{pod="s-1"}': "0x30",
    "pdserve_scaler_blind": "0x30",
    'pdserve_scaler_failures_total{code="conflict"}': "1x10 2x20",
    "pdserve_scaler_policy_refused": "0x30",
}
"""Series of a cluster that is well; as `promtool test rules` writes them, a sample a minute."""

BROKEN: dict[str, tuple[dict[str, str | None], dict[str, str]]] = {
    "PdserveNotScraped": (dict.fromkeys(HEALTHY), {}),
    "PdservePrefillPoolEmpty": (
        {'pdserve_engine_info{engine="p-0",role="prefill",state="ready"}': None},
        {"role": "prefill", "state": "ready"},
    ),
    "PdserveDecodePoolEmpty": (
        {'pdserve_engine_info{engine="d-0",role="decode",state="ready"}': None},
        {"role": "decode", "state": "ready"},
    ),
    "PdserveEngineRestarts": ({'pdserve_engine_restarts_total{engine="d-0"}': "0+1x30"}, {"engine": "d-0"}),
    "PdserveEngineSilent": ({'pdserve_late_heartbeats_total{engine="d-0"}': "0+1x30"}, {"engine": "d-0"}),
    "PdserveRequestsFail": ({'pdserve_requests_total{endpoint="chat",status="engine_died"}': "0+10x30"}, {}),
    "PdserveRequestsRefused": ({'pdserve_admission_rejections_total{tenant="default",reason="ttft"}': "0+60x30"}, {}),
    "PdserveFirstTokenLate": ({'pdserve_time_to_first_token_seconds_bucket{le="0.5"}': "0+300x30"}, {}),
    "PdserveTokensLate": ({'pdserve_inter_token_latency_seconds_bucket{le="0.05"}': "0+300x30"}, {}),
    "PdserveHandoffSlow": ({'pdserve_handoff_gap_seconds_bucket{le="0.05"}': "0+300x30"}, {}),
    "PdserveKVFull": ({'pdserve_kv_blocks{engine="d-0",state="free"}': "1x30"}, {"engine": "d-0"}),
    "PdserveKVQuarantined": ({'pdserve_kv_blocks{engine="d-0",state="quarantined"}': "20x30"}, {"engine": "d-0"}),
    "PdserveLinksLost": ({'pdserve_lost_links{engine="d-0"}': "1x30"}, {"engine": "d-0"}),
    "PdserveTransfersFail": ({'pdserve_transfers_total{backend="nixl",result="link_lost"}': "0+10x30"}, {}),
    "PdserveKVDamaged": ({'pdserve_transfers_total{backend="nixl",result="digest_mismatch"}': "0x20 1x10"}, {}),
    "PdserveTierDamaged": (
        {'pdserve_kv_tier_errors_total{engine="d-0",tier="disk",cause="io"}': "0x20 1x10"},
        {"engine": "d-0", "tier": "disk"},
    ),
    "PdserveNumericsDiffer": ({"pdserve_numerics": "2x30"}, {}),
    "PdservePolicyFails": ({'pdserve_policy_errors_total{error="KeyError"}': "0x20 1x10"}, {"error": "KeyError"}),
    "PdserveRedisLost": ({"pdserve_redis_up": "0x30"}, {}),
    "PdserveScalerLeaderless": ({'pdserve_scaler_leader{pod="s-0"}': "0x30"}, {}),
    "PdserveScalerBlind": ({"pdserve_scaler_blind": "1x30"}, {}),
    "PdserveScalingFails": ({'pdserve_scaler_failures_total{code="conflict"}': "0+1x30"}, {"code": "conflict"}),
    "PdservePolicyRefused": ({"pdserve_scaler_policy_refused": "1x30"}, {}),
}
"""By alert: what differs from a healthy cluster, and the labels that the alert then has beside its severity."""


def scenario(differing: dict[str, str | None], fires: str = "", labels: dict[str, str] | None = None) -> dict[str, Any]:
    """Every alert is asked after at the end; only the named one fires."""
    series = {name: values for name, values in {**HEALTHY, **differing}.items() if values is not None}
    rules = {rule["alert"]: rule for group in alerts()["groups"] for rule in group["rules"]}
    asked = []
    for name, rule in rules.items():
        fired = [{"exp_labels": {**rule["labels"], **(labels or {})}}] if name == fires else []
        asked.append({"eval_time": f"{END}m", "alertname": name, "exp_alerts": fired})
    return {
        "name": fires or "healthy",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": asked,
    }


def without_words(rules: dict[str, Any]) -> dict[str, Any]:
    """Annotations carry measured values: their wording is not what is tested."""
    groups = [
        {**group, "rules": [{k: v for k, v in rule.items() if k != "annotations"} for rule in group["rules"]]}
        for group in rules["groups"]
    ]
    return {"groups": groups}


def test_each_alert_has_a_scenario() -> None:
    assert BROKEN.keys() == {rule["alert"] for group in alerts()["groups"] for rule in group["rules"]}


def test_each_alert_fires_on_its_own_trouble_only(tmp_path: Path) -> None:
    tests = [scenario({}), *(scenario(differing, name, labels) for name, (differing, labels) in BROKEN.items())]
    ran = try_rules(tmp_path, without_words(alerts()), tests)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_prometheus_takes_rules_and_queries(tmp_path: Path) -> None:
    queries = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(expressions().values())]
    for name, groups in (("rules", alerts()["groups"]), ("queries", [{"name": "queries", "rules": queries}])):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
        ran = promtool("check", "rules", str(path))
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_targets_of_the_configuration_become_thresholds() -> None:
    slo = {"config": {"slo": {"ttft": 2.5, "tpot": 0.05}}}
    found = {rule["alert"]: rule["expr"] for group in alerts(slo)["groups"] for rule in group["rules"]}
    assert found["PdserveFirstTokenLate"].endswith("> 2.5")
    assert found["PdserveTokensLate"].endswith("> 0.05")


@pytest.mark.parametrize(("place", "expression"), expressions().items(), ids=list(expressions()))
def test_an_expression_reads_metrics_and_labels_that_exist(place: str, expression: str) -> None:
    leader = Description(LEADER[0], "gauge", (), LEADER[1])
    described = {description.name: description for description in [*Metrics().described, leader]}
    assert metrics_in(expression)
    for name, matched in selectors_in(expression):
        base = name if name in described else re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in described, f"{place}: pdserve does not export {name}"
        assert base == name or described[base].kind == "histogram"
        assert matched <= set(described[base].labels), f"{place}: {name} has no label {matched}"


def test_rules_of_a_scaler_are_there_with_a_policy_and_of_its_leader_where_there_are_several() -> None:
    def names(values: dict[str, Any]) -> set[str]:
        return {rule["alert"] for group in alerts(values)["groups"] for rule in group["rules"]}

    everything = names({})
    assert everything - names({"ray": {"mode": "builtin"}}) == {"PdserveScalerLeaderless"}
    scaler = {"PdserveScalerLeaderless", "PdserveScalerBlind", "PdserveScalingFails", "PdservePolicyRefused"}
    assert everything - names({"policies": {}}) == scaler


def test_what_is_no_promql_is_noticed() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        metrics_in("sum by (engine) (pdserve_kv_blocks")


def test_codes_that_rules_name_are_codes_of_errors() -> None:
    known = {PdserveError.code} | {kind.code for kind in _kinds(PdserveError)}
    named = re.findall(r'(?:status|result)=~?"([a-z_|]+)"', " ".join(expressions().values()))
    assert {code for codes in named for code in codes.split("|")} <= known
    assert named


def _kinds(kind: type[PdserveError]) -> set[type[PdserveError]]:
    return set(kind.__subclasses__()).union(*(_kinds(child) for child in kind.__subclasses__()))
