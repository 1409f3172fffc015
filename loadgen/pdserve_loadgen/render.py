"""A report as a table for a terminal."""

from io import StringIO

from rich.console import Console
from rich.table import Table

from pdserve_loadgen.percentiles import Distribution
from pdserve_loadgen.report import Report

WIDTH = 100
_MEASURES = (
    ("TTFT", "ttft"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("E2E", "e2e"),
    ("handoff gap", "handoff_gap"),
)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def render(report: Report, *, color: bool = False) -> str:
    """Counts, latencies in milliseconds, rates, errors, notes and the verdict."""
    text = StringIO()
    console = Console(file=text, width=WIDTH, highlight=False, force_terminal=color, no_color=not color)
    console.print(report.title, style="bold", markup=False, soft_wrap=True)
    console.print(_counts(report), markup=False, soft_wrap=True)
    console.print(_latencies(report))
    for line in _rates(report):
        console.print(line, markup=False, soft_wrap=True)
    for code, count in report.errors.items():
        console.print(f"error {code}: {count}", style="red", markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    for line in _verdict(report):
        console.print(line, style="green" if report.passed else "red", markup=False, soft_wrap=True)
    return text.getvalue().rstrip("\n")


def _counts(report: Report) -> str:
    parts = [f"{report.succeeded} answered", f"{report.failed} failed", f"{report.cancelled} cancelled"]
    warmup = f", after {report.warmup} to warm up" if report.warmup else ""
    return f"{report.requests} requests in {report.duration:.2f} s: {', '.join(parts)}{warmup}"


def _latencies(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("milliseconds")
    for title in (*_COLUMNS, "count"):
        table.add_column(title, justify="right", min_width=8)
    for title, name in _MEASURES:
        table.add_row(title, *_row(getattr(report, name)))
    if report.lateness and report.lateness.max > 0:
        table.add_row("lateness", *_row(report.lateness))
    return table


def _row(values: Distribution | None) -> list[str]:
    if values is None:
        return ["-"] * len(_COLUMNS) + ["0"]
    return [*(f"{getattr(values, name) * 1e3:.2f}" for name in _COLUMNS), str(values.count)]


def _rates(report: Report) -> list[str]:
    lines = [
        f"throughput: {report.request_throughput:.2f} requests/s, {report.output_throughput:.1f} output tokens/s, "
        f"{report.input_throughput:.1f} input tokens/s"
    ]
    if report.input_lengths and report.output_lengths:
        lines.append(
            f"lengths: {report.input_lengths.mean:.1f} tokens in (p99 {report.input_lengths.p99:.0f}), "
            f"{report.output_lengths.mean:.1f} out (p99 {report.output_lengths.p99:.0f})"
        )
    return lines


def _verdict(report: Report) -> list[str]:
    verdict = report.verdict
    if verdict is None:
        return []
    return [
        f"goodput: {verdict.goodput:.2f} requests/s within {verdict.slo}",
        f"{'PASS' if verdict.passed else 'FAIL'}: {verdict.met} of {verdict.judged} requests "
        f"({verdict.attainment:.1%}) met the targets, {verdict.slo.attainment:.1%} wanted",
    ]
