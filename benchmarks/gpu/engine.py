"""An engine without its server: the real scheduler and executor around a model with random weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, pairwise
from random import Random

import torch
from torch import Tensor

from benchmarks.gpu.models import random_model
from benchmarks.gpu.timing import DEVICE, HAS_GPU, Mark, wait
from benchmarks.shapes import Shape
from pdserve.attention.triton_backend import TritonAttention
from pdserve.core.batch import Batch, Row, SamplerInit, StepOutput, TokenSource
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import Request
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import Emitted
from pdserve.worker.decode_graphs import BUCKETS
from pdserve.worker.graph_runner import GraphRunner
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.overlapped import OverlappedExecutor
from pdserve.worker.worker import WorkerOptions, kv_layout

SETTINGS = SamplerInit(temperature=0.6)


@dataclass(frozen=True, slots=True)
class Span:
    """What was submitted between two marks, and how long the host took to submit it."""

    kind: str
    begin: Mark
    end: Mark
    host: float


@dataclass(slots=True)
class Trace:
    """All spans of a run, in the order of the stream."""

    spans: list[Span] = field(default_factory=list)

    def idle_share(self, kinds: tuple[str, ...]) -> float | None:
        """The part of the device's time between spans of these kinds that follow each other; None without any."""
        runs = [(a, b) for a, b in pairwise(self.spans) if a.kind in kinds and b.kind in kinds]
        idle = sum(a.end.until(b.begin) for a, b in runs)
        total = sum(a.begin.until(b.begin) for a, b in runs)
        return idle / total if total else None

    def seconds(self, kind: str) -> list[float]:
        return [span.begin.until(span.end) for span in self.spans if span.kind == kind]

    def host_seconds(self, kind: str) -> list[float]:
        return [span.host for span in self.spans if span.kind == kind]


DECODE, SAMPLE, PROMPT = "decode", "sample", "prompt"


class TimedRunner(GraphRunner):
    """Marks the stream before and after everything it submits."""

    trace = Trace()

    def forward(self, batch: Batch) -> Tensor:
        begin, clock = Mark(), time.perf_counter()
        logits = super().forward(batch)
        kind = DECODE if all(row.num_tokens == 1 for row in batch.rows) else PROMPT
        self.trace.spans.append(Span(kind, begin, Mark(), time.perf_counter() - clock))
        return logits

    def begin_sample(
        self, batch: Batch, logits: Tensor, masks: Sequence[bytes | None] | None = None
    ) -> Callable[[], StepOutput]:
        begin, clock = Mark(), time.perf_counter()
        output = super().begin_sample(batch, logits, masks)
        decodes = all(row.num_tokens == 1 for row in batch.rows)
        kind = SAMPLE if decodes else PROMPT
        self.trace.spans.append(Span(kind, begin, Mark(), time.perf_counter() - clock))
        return output


class Engine:
    """A model, its KV memory for num_tokens, and what computes its steps. buckets: the rows of recorded steps."""

    def __init__(
        self,
        shape: Shape,
        *,
        num_tokens: int,
        buckets: tuple[int, ...] = BUCKETS,
        deterministic: bool = False,
        block_size: int = 16,
    ) -> None:
        self.shape, self.block_size = shape, block_size
        began = time.perf_counter()
        self.loaded = random_model(shape, deterministic=deterministic)
        self.layout = kv_layout(
            self.loaded, WorkerOptions(num_blocks=-(-num_tokens // block_size), block_size=block_size)
        )
        self.kv = KVTensors(self.layout, device=DEVICE)
        self.kv.memory.view(self.loaded.dtype).normal_()  # zeros cost a device less power, and so less time
        attention = TritonAttention(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=block_size,
            dtype=self.loaded.dtype,
            device=DEVICE,
            deterministic=deterministic,
        )
        wait()
        loaded, before = time.perf_counter(), self.device_bytes()
        self.runner = TimedRunner(self.loaded, attention, self.kv, buckets=buckets)
        if HAS_GPU:  # an interpreter has nothing to compile
            self.runner.warm_up()
        wait()
        self.load_seconds, self.record_seconds = loaded - began, time.perf_counter() - loaded
        self.graph_bytes = self.device_bytes() - before
        self._steps = count()
        self._scattered = Random(0).sample(range(self.layout.num_blocks), self.layout.num_blocks)

    @staticmethod
    def device_bytes() -> int:
        """Held by torch, less what it keeps for later only."""
        if DEVICE.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def step(self, rows: Sequence[Row], *, collect: bool = True) -> StepOutput | None:
        """Submit a step; its output, unless that is not to be waited for."""
        batch = Batch(step=next(self._steps), rows=tuple(rows))
        output = self.runner.begin_sample(batch, self.runner.forward(batch))
        return output() if collect else None

    def prefill(self, sequence: int, tokens: int) -> None:
        """A prompt of random tokens from its beginning, in one step."""
        ids = Random(sequence).choices(range(self.shape.vocab), k=tokens)
        blocks = self._scattered[: -(-tokens // self.block_size)]
        row = Row(
            sequence_id=sequence,
            start=0,
            num_tokens=tokens,
            token_ids=tuple(ids),
            block_ids=tuple(blocks),
            sample=True,
            sampler=SETTINGS,
        )
        self.step([row])

    def decode(self, lengths: Sequence[int], steps: int) -> None:
        """Steps of sequences that are supposed to have these many tokens, in blocks of their own, submitted without
        waiting for any but the last."""
        counts = [-(-(length + steps) // self.block_size) for length in lengths]
        if sum(counts) > self.layout.num_blocks:
            raise ValueError(f"{sum(counts)} blocks are needed, and there are {self.layout.num_blocks}")
        ends = list(accumulate(counts))
        tables = [tuple(self._scattered[end - size : end]) for size, end in zip(counts, ends, strict=True)]
        for number in range(steps):
            rows = [
                self._decode_row(i, length + number, tables[i], first=number == 0) for i, length in enumerate(lengths)
            ]
            self.step(rows, collect=number == steps - 1)

    def _decode_row(self, sequence: int, place: int, table: tuple[int, ...], *, first: bool) -> Row:
        return Row(
            sequence_id=sequence,
            start=place,
            num_tokens=1,
            token_ids=(1,) if first else (),
            block_ids=table[: place // self.block_size + 1],
            token_source=TokenSource.KNOWN if first else TokenSource.PREVIOUS_STEP,
            sample=True,
            sampler=SETTINGS if first else None,
        )

    def restart_trace(self) -> Trace:
        self.runner.trace = Trace()
        return self.runner.trace


async def generate(engine: Engine, requests: Sequence[Request], limits: EngineLimits) -> tuple[int, float]:
    """All requests at once through scheduler and executor: tokens emitted and seconds taken."""
    tickets = count()
    core = EngineCore(
        info=engine.loaded.info,
        limits=limits,
        layout=engine.layout,
        clock=SystemClock(),
        new_ticket_id=lambda: str(next(tickets)),
    )
    executor = OverlappedExecutor(engine.runner)
    try:
        for request in requests:
            core.add(request)
        began, tokens, handles = time.perf_counter(), 0, []
        while core.has_work:
            while batch := core.schedule():
                handles.append(executor.forward(batch))
                executor.sample(handles[-1])
            events = core.complete(await executor.collect(handles.pop(0)))
            tokens += sum(len(event.token_ids) for event in events if isinstance(event, Emitted))
        return tokens, time.perf_counter() - began
    finally:
        executor.close()
