"""docs/metrics.md, written from the metrics themselves by `make metrics-table`."""

from pdserve.telemetry.metrics import Description, Metrics
from pdserve.telemetry.scaler_metrics import LEADER

_HEAD = """# Metrics

`GET /metrics` on the admin port (8002 by default, loopback only; `admin_host` and `admin_port`) gives the gateway's
metrics in the Prometheus text format, without an API key. Seconds and tokens unless the name says otherwise; counters
begin at 0 with each gateway process. `pdserve scale` has those that begin with `pdserve_scaler_` on its probe port
(8101). This table is generated: `make metrics-table`; a test holds it to the code.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def document() -> str:
    """The whole of docs/metrics.md."""
    name, documentation = LEADER
    leader = Description(name, "gauge", (), documentation)
    rows = (
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels) or '–'} | {documentation} |\n"
        for name, kind, labels, documentation in sorted([*Metrics().described, leader])
    )
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    print(document(), end="")
