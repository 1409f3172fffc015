"""Hugging Face transformers: the model's own forward pass over its cache, without the bookkeeping of `generate`.

Sequences are of one length, so that nothing is padded or masked beyond the causal mask.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.cpu.contender import Prompt


class Transformers:
    """Attention by sdpa, the best it has on CPU; a dynamic cache."""

    name = "transformers"

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").eval()
        self._cache = DynamicCache(config=self._model.config)
        self._next = torch.empty(0, 1, dtype=torch.int64)
        self.how = "forward over a DynamicCache, attn_implementation sdpa, sequences of one length"

    def prefill(self, prompt: Prompt) -> int:
        _, chosen = self._forward(torch.tensor([prompt]), DynamicCache(config=self._model.config))
        return int(chosen)

    def begin(self, prompts: Sequence[Prompt]) -> None:
        first = torch.tensor([prompts[0]])
        self._cache, chosen = self._forward(first, DynamicCache(config=self._model.config))
        self._cache.batch_repeat_interleave(len(prompts))
        self._next = chosen.expand(len(prompts), 1)

    def step(self) -> list[int]:
        self._cache, self._next = self._forward(self._next, self._cache)
        return [int(token) for token in self._next[:, 0].tolist()]

    def close(self) -> None:
        del self._model, self._cache

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, cache: DynamicCache) -> tuple[DynamicCache, Tensor]:
        out = self._model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
        return cache, out.logits[:, -1].argmax(-1, keepdim=True)
