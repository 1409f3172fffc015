"""The GPU tests in one command, within nine minutes: a process per test function, several side by side.

    PYTHONPATH=.:kernels python -m tests.gpu.run        (make test-gpu)

A kernel that reads where it may not ends its process's use of the GPU, and one that never returns its process: neither
touches the other functions. What a function's tests said is printed when it ends, or when no time is left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

TOTAL_SECONDS = 530.0
SIDE_BY_SIDE = max(2, min(8, (os.cpu_count() or 2) // 2))
"""Most of the time kernels are compiled, each on one core."""
SUITE = ("-c", "tests/gpu/suite.ini", "--rootdir=.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a function's tests: passed, left out, failed or cut off, and what pytest printed."""

    function: str
    result: str
    seconds: float
    text: str

    @property
    def fine(self) -> bool:
        return self.result in ("passed", "left out")


def functions(suite: Sequence[str], tests: str, folder: Path) -> list[str]:
    """The node ids of the test functions found there, without their parameters. Raises RuntimeError with what pytest
    says when it finds none, or cannot read a file."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *suite, "--collect-only", "-q", tests],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return list(dict.fromkeys(line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line))


def run_function(function: str, suite: Sequence[str], folder: Path, ends: float) -> Outcome:
    """In a process of its own, until monotonic time ends."""
    begun = time.monotonic()
    if begun >= ends:
        return Outcome(function, "cut off", 0.0, "no time was left")
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", *suite, "-p", "no:cacheprovider", "-v", "-ra", function],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=ends - begun)
            result = {0: "passed", 5: "left out"}.get(process.returncode, "failed")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers its tests started
            text, _ = process.communicate()
            result = "cut off"
    return Outcome(function, result, time.monotonic() - begun, text)


def run_all(suite: Sequence[str], tests: str, folder: Path, total: float) -> list[Outcome]:
    """Every function, printed as it ends, and a list of all in the end."""
    ends = time.monotonic() + total
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        running = [pool.submit(run_function, each, suite, folder, ends) for each in functions(suite, tests, folder)]
        outcomes = []
        for future in as_completed(running):
            outcomes.append(future.result())
            print(f"== {outcomes[-1].function}\n{outcomes[-1].text}", flush=True)
    for outcome in outcomes:
        print(f"{outcome.result:>8}  {outcome.seconds:5.0f} s  {outcome.function}")
    return outcomes


if __name__ == "__main__":
    sys.exit(not all(outcome.fine for outcome in run_all(SUITE, "tests/gpu", Path.cwd(), TOTAL_SECONDS)))
