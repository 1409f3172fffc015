"""The Grafana dashboard, as JSON that Grafana 9 and newer import."""

from typing import Any

_WIDTH, _HEIGHT, _PER_ROW = 8, 8, 3

Panel = tuple[str, str, dict[str, str]]
"""title, unit as Grafana names it, and query by legend."""


def _quantiles(histogram: str) -> dict[str, str]:
    rate = f"sum by (le) (rate({histogram}_bucket[$__rate_interval]))"
    return {f"p{percent}": f"histogram_quantile({percent / 100}, {rate})" for percent in (50, 95, 99)}


def _mean(histogram: str) -> str:
    return f"sum(rate({histogram}_sum[$__rate_interval])) / sum(rate({histogram}_count[$__rate_interval]))"


PANELS: tuple[Panel, ...] = (
    ("Time to first token", "s", _quantiles("pdserve_time_to_first_token_seconds")),
    ("Between two tokens", "s", _quantiles("pdserve_inter_token_latency_seconds")),
    ("Handoff gap", "s", _quantiles("pdserve_handoff_gap_seconds")),
    ("Requests by status", "reqps", {"{{status}}": "sum by (status) (rate(pdserve_requests_total[$__rate_interval]))"}),
    (
        "Refused by admission",
        "reqps",
        {"{{reason}}": "sum by (reason) (rate(pdserve_admission_rejections_total[$__rate_interval]))"},
    ),
    ("Waiting to be let in", "short", {"{{tenant}}": "sum by (tenant) (pdserve_admission_waiting_requests)"}),
    (
        "Tokens per second",
        "short",
        {
            "prompt": "sum(rate(pdserve_prompt_tokens_total[$__rate_interval]))",
            "of it cached": "sum(rate(pdserve_cached_prompt_tokens_total[$__rate_interval]))",
            "output": "sum(rate(pdserve_output_tokens_total[$__rate_interval]))",
        },
    ),
    (
        "Where the time to first token goes (mean)",
        "s",
        {stage: _mean(f"pdserve_{stage}_seconds") for stage in ("admission_wait", "queue", "prefill", "transfer")},
    ),
    (
        "Engines by state",
        "short",
        {"{{role}} {{state}}": "count by (role, state) (max by (engine, role, state) (pdserve_engine_info))"},
    ),
    ("Prompt tokens to compute", "short", {"{{engine}}": "max by (engine) (pdserve_engine_backlog_tokens)"}),
    (
        "Sequences",
        "short",
        {
            "{{engine}} running": "max by (engine) (pdserve_engine_running_sequences)",
            "{{engine}} waiting": "max by (engine) (pdserve_engine_waiting_sequences)",
        },
    ),
    ("KV blocks", "short", {"{{engine}} {{state}}": "max by (engine, state) (pdserve_kv_blocks)"}),
    (
        "KV moved",
        "Bps",
        {"{{backend}}": "sum by (backend) (rate(pdserve_transferred_bytes_total[$__rate_interval]))"},
    ),
    (
        "KV handoffs by result",
        "ops",
        {"{{result}}": "sum by (result) (rate(pdserve_transfers_total[$__rate_interval]))"},
    ),
    (
        "Replays, migrations, restarts",
        "ops",
        {
            "replay: {{reason}}": "sum by (reason) (rate(pdserve_replays_total[$__rate_interval]))",
            "migration: {{reason}}": "sum by (reason) (rate(pdserve_migrations_total[$__rate_interval]))",
            "restart": "sum(rate(pdserve_engine_restarts_total[$__rate_interval]))",
        },
    ),
    ("Engines, as the scaler has them", "short", {"{{role}} {{kind}}": "max by (role, kind) (pdserve_scaler_engines)"}),
    (
        "Scaling decisions",
        "short",
        {
            "{{speed}}: {{rule}}": "max by (speed, rule) (increase(pdserve_scaler_decisions_total[$__rate_interval]))",
            "failed: {{code}}": "max by (code) (increase(pdserve_scaler_failures_total[$__rate_interval]))",
        },
    ),
)


def dashboard() -> dict[str, Any]:
    """One panel after another, three in a row."""
    return {
        "title": "pdserve",
        "uid": "pdserve",
        "tags": ["pdserve"],
        "schemaVersion": 37,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    title, unit, queries = panel
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {
            "x": number % _PER_ROW * _WIDTH,
            "y": number // _PER_ROW * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend, "datasource": source}
            for place, (legend, expression) in enumerate(queries.items())
        ],
    }
