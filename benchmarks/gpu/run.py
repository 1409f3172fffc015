"""The GPU suite in one command: every figure of docs/performance.md that needs a GPU, within ten minutes on one.

    PYTHONPATH=.:kernels python -m benchmarks.gpu.run --out build/gpu.json        (make bench-gpu)

Sections run in processes of their own with a budget each; what a section told before its budget ended, or before it
failed, stays in the JSON, which is written anew after each. --dry goes through every section with tiny shapes, in
Triton's interpreter where there is no GPU: its figures mean nothing.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TOTAL_SECONDS = 570.0
_GRACE = 5.0
"""A section looks at its budget between measurements; this much later it is ended."""


@dataclass(frozen=True, slots=True)
class Section:
    """names of several run side by side; seconds is the budget of them together."""

    names: tuple[str, ...]
    seconds: float


SHAPES = ("Llama-3.1-8B", "Qwen3-8B", "Qwen3-0.6B")
MODES = {"": False, " deterministic": True}
SECTIONS = (
    Section(tuple(f"compile {shape}{mode}" for shape in SHAPES for mode in MODES), 100),
    Section(("offline Qwen3-0.6B",), 50),
    Section(("steps",), 55),
    Section(("latency",), 40),
    Section(("kernels",), 110),
    Section(("offline Llama-3.1-8B",), 60),
    Section(("prefill",), 40),
    Section(("offline Qwen3-8B",), 50),
    Section(("deterministic",), 40),
    Section(("peers",), 100),
)


def measure(name: str, emit: Callable[[dict[str, Any]], None], *, dry: bool, seconds: float) -> None:
    """Run one section in this process. Imports torch only here: the parent needs none."""
    from benchmarks.gpu import peers, sections
    from benchmarks.gpu.models import LLAMA_8B, QWEN3_06B, QWEN3_8B

    run = sections.Run(emit=emit, dry=dry, ends=time.monotonic() + seconds)
    table: dict[str, Callable[[sections.Run], None]] = {
        "kernels": sections.kernel_table,
        "steps": sections.step_breakdown,
        "latency": sections.latency,
        "prefill": sections.prefill,
        "deterministic": sections.deterministic,
        "peers": peers.peers,
    }
    for shape in (LLAMA_8B, QWEN3_8B, QWEN3_06B):
        chosen = run.shapes(shape)[0]
        for mode, deterministic in MODES.items():
            compiled = partial(sections.compile_kernels, shape=chosen, deterministic=deterministic)
            table[f"compile {shape.name}{mode}"] = compiled
        table[f"offline {shape.name}"] = partial(sections.offline, shape=chosen)
    table[name](run)


@dataclass(slots=True)
class Child:
    """A section's process, and the file of JSON lines it writes."""

    name: str
    process: subprocess.Popen[bytes]
    lines: Path
    began: float

    @classmethod
    def start(cls, name: str, folder: Path, seconds: float, *, dry: bool) -> "Child":
        lines = folder / f"{name}.jsonl"
        return cls(name, subprocess.Popen(_command(name, str(lines), seconds, dry)), lines, time.monotonic())

    def result(self, ends: float) -> dict[str, Any]:
        """Wait until then at most."""
        try:
            status = self.process.wait(max(0.0, ends - time.monotonic()))
            outcome = "complete" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            outcome = "cut off by its budget"
        text = self.lines.read_text() if self.lines.exists() else ""
        # The last line of a section that was ended may be half a line.
        results = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return {"outcome": outcome, "seconds": round(time.monotonic() - self.began, 1), "results": results}


def _command(name: str, lines: str, seconds: float, dry: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--section", name, "--out", lines, "--seconds", str(seconds)]
    return [*command, "--dry"] if dry else command


def run_all(out: Path, only: str, total: float, *, dry: bool) -> dict[str, Any]:
    """All sections whose name contains `only`; the JSON grows with each."""
    out.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + total
    report: dict[str, Any] = {"facts": facts(), "dry": dry, "sections": {}}
    for section in SECTIONS:
        names = [name for name in section.names if only in name]
        budget = min(section.seconds, ends - time.monotonic() - _GRACE)
        if not names or budget < 10:
            report["sections"] |= {name: {"outcome": "left out: no time"} for name in names}
            out.write_text(json.dumps(report, indent=1) + "\n")
            continue
        until = time.monotonic() + budget + _GRACE
        with TemporaryDirectory() as folder:
            for child in [Child.start(name, Path(folder), budget, dry=dry) for name in names]:
                report["sections"][child.name] = child.result(until)
                print(f"{child.name}: {report['sections'][child.name]['outcome']}", flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def facts() -> dict[str, Any]:
    """Of machine and code."""
    ask = "name,memory.total,clocks.max.sm,driver_version"
    return {
        "commit": _told_by("git", "rev-parse", "HEAD"),
        "gpu": _told_by("nvidia-smi", f"--query-gpu={ask}", "--format=csv,noheader"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def _told_by(*command: str) -> str:
    """What a program prints; none where it is missing or fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="where the JSON goes")
    parser.add_argument("--only", default="", help="the sections whose name contains this")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to try the suite")
    parser.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds for all sections")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry and not shutil.which("nvidia-smi"):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it is first imported
    if args.section is None:
        run_all(args.out, args.only, args.total, dry=args.dry)
        return
    with args.out.open("w") as lines:

        def emit(result: dict[str, Any]) -> None:
            lines.write(json.dumps(result) + "\n")
            lines.flush()

        measure(args.section, emit, dry=args.dry, seconds=args.seconds)


if __name__ == "__main__":
    main()
