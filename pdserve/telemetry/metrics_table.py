"""docs/metrics.md, written from the metrics themselves by `make metrics-table`."""

from pdserve.telemetry.metrics import Metrics

_HEAD = """# Metrics

`GET /metrics` on the admin port (8002 by default, loopback only; `admin_host` and `admin_port`) gives the gateway's
metrics in the Prometheus text format, without an API key. Seconds and tokens unless the name says otherwise; counters
begin at 0 with each gateway process. This table is generated: `make metrics-table`; a test holds it to the code.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def document() -> str:
    """The whole of docs/metrics.md."""
    rows = (
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels) or '–'} | {documentation} |\n"
        for name, kind, labels, documentation in sorted(Metrics().described)
    )
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    print(document(), end="")
