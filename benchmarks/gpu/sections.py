"""What the GPU suite measures, one section per process. A section tells each result as soon as it has it, so that one
cut off by its budget still leaves what it measured."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import attention, ops
from benchmarks.gpu.engine import DECODE, PROMPT, SAMPLE, Engine, generate
from benchmarks.gpu.models import DTYPE, LLAMA_8B, QWEN3_06B, QWEN3_8B, TINY
from benchmarks.gpu.timing import (
    DEVICE,
    HAS_GPU,
    copy_bytes_per_second,
    product_operations_per_second,
    read_bytes_per_second,
    wait,
)
from benchmarks.shapes import Shape
from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import Request, SamplingParams
from pdserve.worker.decode_graphs import BUCKETS
from pdserve_kernels.paged_attention.tuning import Purpose

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Run:
    """emit: tell a result. dry: shapes so small that an interpreter gets through them. ends: monotonic time by which to
    be done."""

    emit: Emit
    dry: bool
    ends: float

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real

    def shapes(self, *real: Shape) -> tuple[Shape, ...]:
        return (TINY,) if self.dry else real

    @property
    def buckets(self) -> tuple[int, ...]:
        chosen: tuple[int, ...] = self.pick(BUCKETS, (1, 2))
        return chosen


def ceilings() -> dict[str, float]:
    """Of this device, measured here."""
    return {
        "copy_bytes_per_second": copy_bytes_per_second(),
        "read_bytes_per_second": read_bytes_per_second(),
        "bf16_operations_per_second": product_operations_per_second(),
    }


def compile_kernels(run: Run, shape: Shape, *, deterministic: bool) -> None:
    """Fill Triton's cache with what this shape's steps need, on two layers of it: every bucket and a prompt."""
    small = replace(shape, layers=min(2, shape.layers))
    engine = Engine(small, num_tokens=run.pick(8192, 64), buckets=run.buckets, deterministic=deterministic)
    run.emit({"shape": shape.name, "deterministic": deterministic, "seconds": round(engine.record_seconds, 1)})


def kernel_table(run: Run) -> None:
    """Each kernel's achieved part of the ceilings, attention first."""
    limits = ceilings()
    run.emit({"ceilings": limits})
    copy, products = limits["copy_bytes_per_second"], limits["bf16_operations_per_second"]
    for case in _attention_cases(run):
        if run.left < 5:
            return
        _emit(run, {"case": case.name}, partial(_attention, case, limits))
    models = run.pick(ops.MODELS, {"tiny": ops.Model(hidden=64, heads=4, kv_heads=2, mlp=96, vocab=256, dim=16)})
    for name, model in models.items():
        for op in _op_cases(run, model):
            if run.left < 5:
                return
            _emit(run, {"model": name, "kernel": op.name, "rows": op.rows}, partial(ops.measured, op, copy, products))


def _attention(case: attention.Case, limits: dict[str, float]) -> dict[str, Any]:
    result = attention.measured(case, limits["copy_bytes_per_second"], limits["bf16_operations_per_second"])
    part = result["bandwidth"] * limits["copy_bytes_per_second"] / limits["read_bytes_per_second"]
    return result | {"read_bandwidth": round(part, 3)}


def _emit(run: Run, case: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """A case's result, or what went wrong: one that finds too little memory leaves the others as they are."""
    try:
        result = measure()
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"[:300]}
    run.emit({**case, **result})
    _free()


def _attention_cases(run: Run) -> Iterator[attention.Case]:
    if not run.dry:
        yield from attention.decode_cases()
        yield from attention.prefill_cases()
        return
    yield attention.decode("decode 2, uneven", [40, 3], heads=4, kv_heads=2, head_dim=16)
    yield attention.Case(name="prefill", purpose=Purpose.PREFILL, lens=((20, 20),), heads=4, kv_heads=2, head_dim=16)


def _op_cases(run: Run, model: ops.Model) -> Iterator[ops.Case]:
    seen = set()
    for case in ops.cases(model, run.pick(ops.DECODE_ROWS, (2,)), run.pick((4096,), ())):
        if not run.dry or case.name not in seen:
            seen.add(case.name)
            yield case


def step_breakdown(run: Run) -> None:
    """Decode steps by batch: the device's time for the forward pass and for sampling, the host's time to submit, and
    the part of the steady state in which the device has nothing to do."""
    copy = copy_bytes_per_second()
    for shape in run.shapes(LLAMA_8B, QWEN3_06B):
        context, steps = run.pick(1024, 20), run.pick(40, 3)
        batches = run.pick((1, 8, 32, 64, 128, 256), (1, 2))
        engine = Engine(shape, num_tokens=batches[-1] * (context + steps + 16), buckets=run.buckets)
        _told_start(run, engine)
        for rows in batches:
            if run.left < 5:
                return
            engine.decode([context] * rows, 3)
            trace = engine.restart_trace()
            engine.decode([context] * rows, steps)
            forward, choose = median(trace.seconds(DECODE)), median(trace.seconds(SAMPLE))
            floor = shape.step_bytes(rows, context, DTYPE.itemsize) / copy
            run.emit(
                {
                    "shape": shape.name,
                    "rows": rows,
                    "context": context,
                    "forward_ms": round(forward * 1e3, 4),
                    "sample_ms": round(choose * 1e3, 4),
                    "roofline": round(floor / (forward + choose), 3),
                    "idle_share": _rounded(trace.idle_share((DECODE, SAMPLE))),
                    "host_forward_ms": round(median(trace.host_seconds(DECODE)) * 1e3, 4),
                    "host_sample_ms": round(median(trace.host_seconds(SAMPLE)) * 1e3, 4),
                }
            )
        run.emit({"shape": shape.name, "rows": batches[0], "kernels": _by_kernel(engine, context, batches[0])})
        del engine
        _free()


def _by_kernel(engine: Engine, context: int, rows: int) -> dict[str, float] | str:
    """Device microseconds of one step by kernel, as the profiler tells."""
    activity = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[activity.CUDA if HAS_GPU else activity.CPU]) as profile:
            engine.decode([context] * rows, 4)
            wait()
        times = {e.key[:60]: e.device_time_total if HAS_GPU else e.cpu_time_total for e in profile.key_averages()}
    except RuntimeError as error:
        return f"no profile: {error}"
    most = sorted(times.items(), key=lambda item: -item[1])[:15]
    return {name: round(taken / 4, 1) for name, taken in most}


def offline(run: Run, shape: Shape) -> None:
    """nano-vllm's bench.py: seed 0, 256 sequences, prompts and answers of 100 to 1024 random tokens, all at once."""
    rng = Random(0)
    sequences, low, high = run.pick((256, 100, 1024), (3, 4, 12))
    vocab = min(10000, shape.vocab - 1)
    prompts = [[rng.randint(0, vocab) for _ in range(rng.randint(low, high))] for _ in range(sequences)]
    answers = [rng.randint(low, high) for _ in range(sequences)]
    total = sum(map(len, prompts)) + sum(answers)
    engine = Engine(shape, num_tokens=total + 32 * sequences, buckets=run.buckets)
    _told_start(run, engine)
    limits = EngineLimits(
        max_tokens_per_step=run.pick(8192, 24),
        max_rows=sequences,
        chunk_size=run.pick(8192, 16),
        max_model_len=run.pick(4096, 64),
        prefix_caching=False,
    )
    requests = [
        Request(
            id=str(i),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=answer, seed=i),
            timeout=600.0,
        )
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    for repetition in range(run.pick(3, 1)):
        trace = engine.restart_trace()
        tokens, seconds = asyncio.run(generate(engine, requests, limits))
        run.emit(
            {
                "shape": shape.name,
                "repetition": repetition,
                "prompt_tokens": sum(map(len, prompts)),
                "output_tokens": tokens,
                "seconds": round(seconds, 3),
                "output_tokens_per_second": round(tokens / seconds, 1),
                "idle_share": _rounded(trace.idle_share((DECODE, SAMPLE, PROMPT))),
                "idle_share_of_decode": _rounded(trace.idle_share((DECODE, SAMPLE))),
                "steps": len(trace.seconds(DECODE)),
            }
        )
        if run.left < seconds + 3:
            return


def latency(run: Run) -> None:
    """A step of one sequence against its context, and the line through the points."""
    for shape in run.shapes(LLAMA_8B, QWEN3_8B):
        steps = run.pick(30, 3)
        contexts = run.pick((128, 1024, 4096, 8192, 16384, 32768), (8, 60))
        engine = Engine(shape, num_tokens=contexts[-1] + 2 * steps + 32, buckets=(1,))
        points = []
        for context in contexts:
            engine.decode([context], 3)
            trace = engine.restart_trace()
            engine.decode([context], steps)
            taken = [a + b for a, b in zip(trace.seconds(DECODE), trace.seconds(SAMPLE), strict=True)]
            points.append((context, median(taken) * 1e3))
            run.emit({"shape": shape.name, "context": context, "ms": round(points[-1][1], 4)})
        slope, base = _line(points)
        run.emit({"shape": shape.name, "base_ms": round(base, 4), "ms_per_token": slope, "bar": [4.5, 3.05e-5]})
        del engine
        _free()


def prefill(run: Run) -> None:
    """A prompt in one step: the part of the product ceiling, and of 790 TFLOP/s."""
    products = product_operations_per_second()
    for shape in run.shapes(LLAMA_8B, QWEN3_8B, QWEN3_06B):
        lengths = run.pick((512, 2048, 8192, 16384), (8, 20))
        engine = Engine(shape, num_tokens=lengths[-1] + 16, buckets=(1,))
        for tokens in lengths:
            engine.prefill(0, tokens)
            trace = engine.restart_trace()
            for sequence in range(run.pick(5, 1)):
                engine.prefill(sequence, tokens)
            spans = trace.seconds(PROMPT)
            taken = median(a + b for a, b in zip(spans[::2], spans[1::2], strict=True))
            rate = shape.prefill_operations(tokens) / taken
            run.emit(
                {
                    "shape": shape.name,
                    "tokens": tokens,
                    "ms": round(taken * 1e3, 3),
                    "mfu_of_measured": round(rate / products, 3),
                    "mfu_of_790": round(rate / 790e12, 3),
                }
            )
        del engine
        _free()


def deterministic(run: Run) -> None:
    """What deterministic mode costs: the same steps in both modes."""
    for shape in run.shapes(LLAMA_8B, QWEN3_06B):
        context, steps, tokens = run.pick((1024, 20, 2048), (20, 3, 20))
        batches = run.pick((1, 32, 128), (1, 2))
        times: dict[str, list[float]] = {}
        for mode in (False, True):
            room = max(tokens, batches[-1] * (context + steps + 16))
            engine = Engine(shape, num_tokens=room, buckets=run.pick((1, 32, 128), (1, 2)), deterministic=mode)
            for rows in batches:
                engine.decode([context] * rows, 3)
                trace = engine.restart_trace()
                engine.decode([context] * rows, steps)
                times.setdefault(f"decode {rows}", []).append(median(trace.seconds(DECODE)))
            engine.prefill(0, tokens)
            trace = engine.restart_trace()
            engine.prefill(1, tokens)
            times.setdefault(f"prefill {tokens}", []).append(trace.seconds(PROMPT)[0])
            run.emit(
                {
                    "shape": shape.name,
                    "deterministic": mode,
                    "ms": {name: round(taken[-1] * 1e3, 3) for name, taken in times.items()},
                }
            )
            del engine
            _free()
        for name, (plain, fixed) in times.items():
            run.emit({"shape": shape.name, "step": name, "cost": round(fixed / plain, 3)})


def _told_start(run: Run, engine: Engine) -> None:
    run.emit(
        {
            "shape": engine.shape.name,
            "load_seconds": round(engine.load_seconds, 2),
            "record_seconds": round(engine.record_seconds, 2),
            "graph_mib": engine.graph_bytes >> 20,
        }
    )


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Slope and intercept, by least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _free() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
