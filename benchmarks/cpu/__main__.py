"""pdserve beside Hugging Face transformers and llama.cpp on one CPU core, on the same random weights.

    python -m benchmarks.cpu [--shapes 25M 0.5B] [--dtypes float32 bfloat16]

All run in this process, pinned to one core with one thread each, turn by turn: prefill of prompts nobody has seen, then
decoding of 1, 8 and 32 sequences. That all choose the same token for the first prompt tells that they compute the same
model. Results are merged into the file by cell, so that shapes can be measured in several calls.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.cpu.contender import Contender, Prompt
from benchmarks.cpu.overhead import measure_overhead
from benchmarks.cpu.pdserve_contender import Pdserve
from benchmarks.cpu.shapes import SHAPES, write_checkpoint
from benchmarks.cpu.transformers_contender import Transformers
from benchmarks.shapes import Shape
from pdserve.config.schema import Config

BATCHES = (1, 8, 32)
CONTEXT = {"25M": 256, "0.5B": 128}
"""Tokens of a prompt, and before the first decode step."""

STEPS = {"25M": 10, "0.5B": 2}
"""Decode steps per turn."""

OUT = Path(__file__).parents[1] / "results" / "cpu.json"


def contenders(shape_name: str, dtype: str, folder: Path) -> list[Contender]:
    shape, context = SHAPES[shape_name], CONTEXT[shape_name]
    checkpoint = write_checkpoint(folder / f"{shape_name}-{dtype}", shape, getattr(torch, dtype))
    blocks = (max(BATCHES) + 8) * -(-(context + 256) // 16)
    made: list[Contender] = [Pdserve(checkpoint, dtype, num_blocks=blocks)]
    made.append(Transformers(checkpoint, getattr(torch, dtype)))
    try:
        from benchmarks.cpu.gguf_file import write_gguf
        from benchmarks.cpu.llama_cpp_contender import LlamaCpp
    except ImportError as error:
        print(f"without llama.cpp: {error}")
        return made
    file = write_gguf(checkpoint, folder / f"{shape_name}-{dtype}.gguf")
    made.append(LlamaCpp(file, dtype, context=context + 256, max_sequences=max(BATCHES), flash_attention=False))
    return made


def measure(shape_name: str, dtype: str, rounds: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Cells of a shape and dtype: prefill, and decode by batch."""
    shape, context = SHAPES[shape_name], CONTEXT[shape_name]
    entrants = contenders(shape_name, dtype, folder)
    prompts = [_prompt(shape, context, rng) for _ in range(max(BATCHES))]
    prefills = [_prompt(shape, context, rng) for _ in range(rounds)]
    chosen = {entrant.name: entrant.prefill(prompts[0]) for entrant in entrants}
    turns = _take_turns(entrants, rounds, lambda entrant, turn: entrant.prefill(prefills[turn]), context)
    cells = {"prefill": _cell(turns, context)}
    for batch in BATCHES:
        for entrant in entrants:
            entrant.begin(prompts[:batch])
        steps = STEPS[shape_name]

        def decode(entrant: Contender, _: int, steps: int = steps) -> None:
            for _ in range(steps):
                entrant.step()

        turns = _take_turns(entrants, rounds, decode, steps * batch)
        cells[f"decode {batch}"] = _cell(turns, context)
    how = {entrant.name: entrant.how for entrant in entrants}
    for entrant in entrants:
        entrant.close()
    return {"how": how, "first_token_agrees": len(set(chosen.values())) == 1, "cells": cells}


def _take_turns(
    entrants: Sequence[Contender], rounds: int, work: Callable[[Contender, int], object], tokens: int
) -> dict[str, list[float]]:
    """Tokens per second of each, by turn; whoever is first changes from turn to turn."""
    speeds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for turn in range(rounds):
        first = turn % len(entrants)
        for entrant in (*entrants[first:], *entrants[:first]):
            begun = time.perf_counter()
            work(entrant, turn)
            speeds[entrant.name].append(tokens / (time.perf_counter() - begun))
    return speeds


def _cell(speeds: dict[str, list[float]], context: int) -> dict[str, Any]:
    """Medians and quartiles, and the median over turns of pdserve's speed over each other's."""
    ours = speeds["pdserve"]
    return {
        "context": context,
        "tokens_per_second": {name: _spread(values) for name, values in speeds.items()},
        "pdserve_over": {
            name: _spread([a / b for a, b in zip(ours, theirs, strict=True)])
            for name, theirs in speeds.items()
            if name != "pdserve"
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {name: round(value, 3) for name, value in zip(("q1", "median", "q3"), quartiles, strict=True)}


def _prompt(shape: Shape, length: int, rng: random.Random) -> Prompt:
    return tuple(rng.randrange(shape.vocab) for _ in range(length))


def merge(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Put found into a file's content, by key, and write it."""
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"benchmark": "cpu", "models": {}}
    report["models"] |= found.pop("models", {})
    report |= found
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def table(report: dict[str, Any]) -> str:
    """Markdown, as in docs/performance.md."""
    lines = ["| model | cell | pdserve, tokens/s | × transformers | × llama.cpp |", "|---|---|---|---|---|"]
    for model, result in report["models"].items():
        for name, cell in result["cells"].items():
            speed = cell["tokens_per_second"]["pdserve"]["median"]
            ratios = [_shown(cell["pdserve_over"].get(other)) for other in ("transformers", "llama.cpp")]
            lines.append(f"| {model} | {name} | {speed:,.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _shown(ratio: dict[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--no-overhead", action="store_true", help="leave the engine's overhead per step out")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    report: dict[str, Any] = {}
    if not args.no_overhead:
        demo = Config().model_path
        prompts = [tuple(rng.randrange(4000) for _ in range(64)) for _ in range(32)]
        overhead = measure_overhead(demo, prompts, steps=100)
        report = merge(args.out, {"overhead": {"model": "demo", "batch": 32, **overhead}})
        print(json.dumps(overhead))
    for shape in args.shapes:
        for dtype in args.dtypes:
            with TemporaryDirectory() as folder:
                result = measure(shape, dtype, args.rounds, rng, Path(folder))
            result |= {"rounds": args.rounds, "load_average": round(os.getloadavg()[0], 2)}
            report = merge(args.out, {"seed": args.seed, "models": {f"{shape} {dtype}": result}})
    print(table(report))


if __name__ == "__main__":
    main()
