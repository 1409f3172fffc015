"""What an engine's step costs beside the model's forward pass and the choice of tokens."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cpu.contender import Prompt
from benchmarks.cpu.pdserve_contender import Pdserve
from pdserve.model.decoder import Decoder
from pdserve.worker.sampler import Sampler


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


def measure_overhead(checkpoint: Path, prompts: list[Prompt], steps: int) -> dict[str, float]:
    """Medians in milliseconds over decode steps of all prompts together. A step is scheduled, computed on the
    executor's thread and taken in; the next one waits for it, so that nothing overlaps."""
    forward, sampling = Stopwatch(), Stopwatch()
    functions = ((Decoder, "forward", forward), (Decoder, "logits", forward), (Sampler, "sample", sampling))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
    for owner, name, watch in functions:
        setattr(owner, name, watch.around(getattr(owner, name)))
    engine = Pdserve(checkpoint, "float32", num_blocks=2048)
    try:
        engine.begin(prompts)
        rows = [_step(engine, forward, sampling) for _ in range(steps)]
    finally:
        engine.close()
        for owner, name, original in originals:
            setattr(owner, name, original)
    columns = zip(*rows, strict=True)
    names = ("step_ms", "forward_ms", "sampling_ms", "overhead_ms")
    return {name: round(statistics.median(column) * 1e3, 3) for name, column in zip(names, columns, strict=True)}


def _step(engine: Pdserve, forward: Stopwatch, sampling: Stopwatch) -> tuple[float, float, float, float]:
    forward.lap(), sampling.lap()
    begun = time.perf_counter()
    engine.step()
    step = time.perf_counter() - begun
    computed, chosen = forward.lap(), sampling.lap()
    return step, computed, chosen, step - computed - chosen
