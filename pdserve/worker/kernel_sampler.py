"""Choosing tokens by the sampling kernel: what Sampler chooses, in two launches whatever the settings, after one that
looks for NaN and infinity."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.core.batch import Row, RowOutput, SamplerInit
from pdserve.worker.row_settings import RowSettings, banned_tokens, sampled_position
from pdserve.worker.sampler import NO_TOKEN, row_output
from pdserve.worker.seen_tokens import SeenTokens
from pdserve_kernels.sampling.kernel import sample
from pdserve_kernels.sampling.reference import noise_stream
from pdserve_kernels.sampling.scores import CONTROLS, KNOBS


class KernelSampler:
    """Samples rows of logits where they lie; the kernel itself adds what it chose to the histories of penalties."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._settings = RowSettings()
        self._seen = SeenTokens(vocab_size, device, torch.int32)

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        sequence_ids = tuple(sequence_ids)
        self._settings.drop(sequence_ids)
        for sequence_id in sequence_ids:
            self._seen.drop(sequence_id)

    def sample(self, logits: Tensor, rows: Sequence[Row], masks: Sequence[bytes | None] | None) -> list[RowOutput]:
        """As Sampler.sample."""
        settings = [self._settings_of(row) for row in rows]
        banned = [banned_tokens(row, init) for row, init in zip(rows, settings, strict=True)]
        masks = masks or [None] * len(rows)
        tokens, logprobs = sample(
            logits,
            self._on_device(_knobs(settings)),
            self._on_device(self._controls(rows, settings, banned, masks)),
            history=self._seen.table if len(self._seen.table) else None,
            allowed=self._on_device(self._allowed(masks)) if any(mask is not None for mask in masks) else None,
            banned=self._on_device(_banned(banned)) if any(banned) else None,
        )
        usable = logits.amax(dim=1).isfinite()
        chosen, values = torch.where(usable, tokens, NO_TOKEN).tolist(), logprobs.tolist()
        for i, (token, mask) in enumerate(zip(chosen, masks, strict=True)):
            if token in banned[i] or not _allows(mask, token):
                chosen[i] = NO_TOKEN  # nothing was left to choose from
        return [
            row_output(row, token, (value,) if init.logprobs else None)
            for row, init, token, value in zip(rows, settings, chosen, values, strict=True)
        ]

    def _settings_of(self, row: Row) -> SamplerInit:
        if row.sampler is not None:
            self._seen.drop(row.sequence_id)
            if row.sampler.repetition_penalty != 1:
                self._seen.start(row.sequence_id, row.sampler.seen_token_ids)
        return self._settings.of(row)

    def _controls(
        self,
        rows: Sequence[Row],
        settings: Sequence[SamplerInit],
        banned: Sequence[tuple[int, ...]],
        masks: Sequence[bytes | None],
    ) -> NDArray[np.int64]:
        controls = np.empty((len(rows), CONTROLS), dtype=np.int64)
        for i, (row, init) in enumerate(zip(rows, settings, strict=True)):
            controls[i] = (
                noise_stream(init.seed, init.sample_index),
                sampled_position(row),
                init.top_k,
                self._seen.row_of(row.sequence_id),
                masks[i] is not None,
                len(banned[i]),
            )
        return controls

    def _allowed(self, masks: Sequence[bytes | None]) -> NDArray[np.int32]:
        """The masks as words of 32 tokens; rows without one hold zeros, which their controls tell to ignore."""
        size = -(-self._vocab_size // 32) * 4
        allowed = np.zeros((len(masks), size), dtype=np.uint8)
        for i, mask in enumerate(masks):
            if mask is not None:
                allowed[i, : min(len(mask), size)] = np.frombuffer(mask, dtype=np.uint8)[:size]
        return allowed.view(np.int32)

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _allows(mask: bytes | None, token: int) -> bool:
    return mask is None or bool(token >= 0 and token // 8 < len(mask) and mask[token // 8] >> token % 8 & 1)


def _knobs(settings: Sequence[SamplerInit]) -> NDArray[np.float32]:
    knobs = np.empty((len(settings), KNOBS), dtype=np.float32)
    for i, init in enumerate(settings):
        knobs[i] = (init.temperature, init.repetition_penalty, 0, 0, init.top_p, init.min_p)
    return knobs


def _banned(banned: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    padded = np.zeros((len(banned), max(map(len, banned))), dtype=np.int32)
    for i, tokens in enumerate(banned):
        padded[i, : len(tokens)] = tokens
    return padded
