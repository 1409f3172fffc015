"""What an engine's step costs beside the model's forward pass and the choice of tokens."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.cpu.contender import Prompt
from benchmarks.cpu.pdserve_contender import Pdserve
from pdserve.engine.core import EngineCore
from pdserve.model.decoder import Decoder
from pdserve.worker.runner import Runner


class Stopwatch:
    """Seconds spent in functions it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed

    def lap(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


TIMED = {
    "model": ((Decoder, "forward"), (Decoder, "logits")),
    "runner": ((Runner, "forward"),),
    "sampling": ((Runner, "sample"),),
    "core": ((EngineCore, "schedule"), (EngineCore, "complete")),
}


def measure_overhead(checkpoint: Path, prompts: list[Prompt], steps: int) -> dict[str, float]:
    """Medians in milliseconds over decode steps of all prompts together. A step is scheduled, computed on the
    executor's thread and taken in; the next one waits for it, so that nothing overlaps.

    overhead is what is neither the model's forward pass nor sampling: of it, inputs is spent on the step's tensors and
    its attention plan, core in the scheduler and the bookkeeping of blocks, and the rest between threads.
    """
    watches = {name: Stopwatch() for name in TIMED}
    with ExitStack() as stack:
        for name, functions in TIMED.items():
            for owner, function in functions:
                timed = watches[name].around(getattr(owner, function))
                stack.enter_context(patch.object(owner, function, timed))
        engine = Pdserve(checkpoint, "float32", num_blocks=2048)
        stack.callback(engine.close)
        engine.begin(prompts)
        rows = engine.run(_steps(engine, watches, steps))
    return {f"{name}_ms": round(statistics.median(row[name] for row in rows) * 1e3, 3) for name in rows[0]}


async def _steps(engine: Pdserve, watches: dict[str, Stopwatch], steps: int) -> list[dict[str, float]]:
    """On one event loop that runs all the time, as an engine's does."""
    return [await _step(engine, watches) for _ in range(steps)]


async def _step(engine: Pdserve, watches: dict[str, Stopwatch]) -> dict[str, float]:
    for watch in watches.values():
        watch.lap()
    begun = time.perf_counter()
    await engine.advance()
    step = time.perf_counter() - begun
    spent = {name: watch.lap() for name, watch in watches.items()}
    return {
        "step": step,
        "model": spent["model"],
        "sampling": spent["sampling"],
        "overhead": step - spent["model"] - spent["sampling"],
        "inputs": spent["runner"] - spent["model"],
        "core": spent["core"],
    }
