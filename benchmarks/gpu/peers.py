"""Hugging Face transformers on the same shapes, turn by turn with pdserve: `generate` and `generate_batch`.

transformers picks its attention by what is installed. Without flash-attention, continuous batching falls back to one
dense masked attention over all packed requests and switches its graphs off: the path it took stands in the result.
"""

import asyncio
import time
from importlib.util import find_spec
from random import Random
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.engine import Engine, generate
from benchmarks.gpu.models import LLAMA_8B, QWEN3_06B, transformers_model
from benchmarks.gpu.sections import Run
from benchmarks.gpu.timing import DEVICE, wait
from benchmarks.shapes import Shape
from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import Request, SamplingParams


class Contest:
    """Prompts of one length, answers of another, on one shape; both models on the device at once."""

    def __init__(self, shape: Shape, *, batch: int, prompt: int, answer: int, buckets: tuple[int, ...]) -> None:
        rng = Random(0)
        self.answer = answer
        self.prompts = [[rng.randrange(shape.vocab - 1) for _ in range(prompt)] for _ in range(batch)]
        self._engine = Engine(shape, num_tokens=batch * (prompt + answer + 32), buckets=buckets)
        self._model = transformers_model(shape)
        self._limits = EngineLimits(
            max_tokens_per_step=8192,
            max_rows=batch,
            chunk_size=8192,
            max_model_len=prompt + answer + 8,
            prefix_caching=False,
        )

    def pdserve(self) -> float:
        """Tokens per second."""
        requests = [
            Request(
                id=str(i),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=self.answer, seed=i),
                timeout=600.0,
            )
            for i, prompt in enumerate(self.prompts)
        ]
        tokens, seconds = asyncio.run(generate(self._engine, requests, self._limits))
        return tokens / seconds

    @torch.inference_mode()
    def generate(self) -> float:
        ids = torch.tensor(self.prompts, device=DEVICE)
        wait()
        began = time.perf_counter()
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=self.answer,
            max_new_tokens=self.answer, pad_token_id=0,
        )  # fmt: skip
        wait()
        return float((out.numel() - ids.numel()) / (time.perf_counter() - began))

    @torch.inference_mode()
    def generate_batch(self) -> float:
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=self.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
        wait()
        began = time.perf_counter()
        answers = self._model.generate_batch(self.prompts, generation_config=settings, progress_bar=False)
        wait()
        tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        return float(tokens / (time.perf_counter() - began))

    @property
    def path(self) -> dict[str, Any]:
        """How transformers attends."""
        names = ("flash_attn", "flash_attn_interface", "kernels")
        return {
            "attn_implementation": self._model.config._attn_implementation,
            "installed": [name for name in names if find_spec(name)],
        }


def peers(run: Run) -> None:
    """Rounds of all three, one after the other; a peer that cannot run is reported with its error."""
    plans = run.pick(
        ((QWEN3_06B, 32, 256, 128), (LLAMA_8B, 1, 256, 64), (LLAMA_8B, 32, 256, 64)), ((run.shapes()[0], 2, 6, 4),)
    )
    for shape, batch, prompt, answer in plans:
        if run.left < 20:
            return
        entry: dict[str, Any] = {"shape": shape.name, "batch": batch, "prompt": prompt, "answer": answer}
        try:
            contest = Contest(shape, batch=batch, prompt=prompt, answer=answer, buckets=run.pick((1, 8, 32), (1, 2)))
        except Exception as error:
            run.emit({**entry, "errors": {"models": f"{type(error).__name__}: {error}"[:300]}})
            continue
        contenders = {
            "pdserve": contest.pdserve,
            "generate": contest.generate,
            "generate_batch": contest.generate_batch,
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        errors: dict[str, str] = {}
        rounds = run.pick(4, 2)
        for number in range(rounds):
            for name, contender in contenders.items():
                if name in errors or run.left < 8:
                    continue
                try:
                    rate = contender()
                except Exception as error:
                    errors[name] = f"{type(error).__name__}: {error}"[:300]
                    continue
                if number:  # the first round warms up
                    rates[name].append(rate)
        told = {
            name: {"median": round(median(r), 1), "min": round(min(r), 1), "max": round(max(r), 1), "rounds": len(r)}
            for name, r in rates.items()
            if r
        }
        ours = told.get("pdserve", {}).get("median", 0.0)
        ratios = {name: round(ours / told[name]["median"], 2) for name in told if name != "pdserve"}
        run.emit({**entry, "tokens_per_second": told, "pdserve_over": ratios, "errors": errors, "path": contest.path})
        del contest
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
