"""llama.cpp through its Python package: the C API, called directly, one batch per step."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.cpu.contender import Prompt

KV_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "bfloat16": llama_cpp.GGML_TYPE_F16}
"""Of equal size per element; its CPU attention has no good path for bfloat16 KV."""

_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)
_PREFILL_BATCH = 512


class LlamaCpp:
    """One context with as many streams of KV as the largest batch has sequences."""

    name = "llama.cpp"

    def __init__(self, file: Path, dtype: str, *, context: int, max_sequences: int, flash_attention: bool) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * (max_sequences + 1)
        params.n_batch = params.n_ubatch = _PREFILL_BATCH
        params.n_seq_max = max_sequences + 1
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = KV_TYPES[dtype]
        params.flash_attn_type = int(flash_attention)
        params.offload_kqv = params.op_offload = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp does not open {file}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_PREFILL_BATCH, 0, 1)
        self._spare = max_sequences
        self._length = 0
        self._next: list[int] = []
        kv = "F32" if dtype == "float32" else "F16"
        self.how = f"llama_decode, flash attention {'on' if flash_attention else 'off'}, KV {kv}"

    def prefill(self, prompt: Prompt) -> int:
        llama_cpp.llama_memory_seq_rm(self._memory, self._spare, -1, -1)
        return self._decode([(token, i, self._spare) for i, token in enumerate(prompt)], last_only=True)[0]

    def begin(self, prompts: Sequence[Prompt]) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        chosen = self.prefill(prompts[0])
        for sequence in range(len(prompts)):
            llama_cpp.llama_memory_seq_cp(self._memory, self._spare, sequence, -1, -1)
        self._length = len(prompts[0])
        self._next = [chosen] * len(prompts)

    def step(self) -> list[int]:
        rows = [(token, self._length, sequence) for sequence, token in enumerate(self._next)]
        self._next = self._decode(rows, last_only=False)
        self._length += 1
        return self._next

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _decode(self, rows: Sequence[tuple[int, int, int]], *, last_only: bool) -> list[int]:
        """rows of (token, position, sequence); the tokens chosen for all rows, or for the last."""
        batch = self._batch
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = not last_only or i == len(rows) - 1
        batch.n_tokens = len(rows)
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        count = 1 if last_only else len(rows)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (count, self._vocab_size))
        return [int(token) for token in logits.argmax(1)]
