"""The alert rules as the chart renders them, and the expressions of rules and dashboard."""

import json
from collections.abc import Iterator
from typing import Any

import promql_parser

from deploy.chart import CHART, render
from tests.chart.manifests import named, of_kind

OF_SCALER = "pdserve_scaler_"
"""What metrics begin with that are there with a policy only."""
_VARIABLES = {"$__rate_interval": "5m"}


def alerts(values: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Prometheus rules file, that of a release with a scaler."""
    policies = {"pools": {"prefill": {"max": 4}, "decode": {"max": 4}}}
    rendered = render({"monitoring": {"rules": {"enabled": True}}, "policies": policies, **(values or {})})
    rule = named(rendered, "PrometheusRule", "pdserve")
    spec: dict[str, Any] = rule["spec"]
    return spec


def expressions() -> dict[str, str]:
    """PromQL by where it stands, without a dashboard's variables."""
    found = {rule["alert"]: rule["expr"] for group in alerts()["groups"] for rule in group["rules"]}
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']}: {target['legendFormat']}"] = target["expr"]
    keda = render({"keda": {"enabled": True, "serverAddress": "http://prometheus"}})
    for scaled in of_kind(keda, "ScaledObject"):
        found[f"KEDA {scaled['metadata']['name']}"] = scaled["spec"]["triggers"][0]["metadata"]["query"]
    for variable, value in _VARIABLES.items():
        found = {place: text.replace(variable, value) for place, text in found.items()}
    return found


def metrics_in(expression: str) -> set[str]:
    """Names of the time series an expression reads. Raises ValueError when it is no PromQL."""
    return {name for name, _ in selectors_in(expression)}


def selectors_in(expression: str) -> list[tuple[str, set[str]]]:
    """(metric, labels it is chosen by) of every selector. Raises ValueError when it is no PromQL."""
    return [
        (selector.name, {matcher.name for matcher in selector.matchers.matchers})
        for selector in _selectors(promql_parser.parse(expression))
        if selector.name
    ]


def _selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("expr", "lhs", "rhs", "param", "vector_selector"):
        inner = getattr(node, part, None)
        if inner is not None and inner is not node:
            yield from _selectors(inner)
    for argument in getattr(node, "args", None) or ():
        yield from _selectors(argument)
