"""Choosing tokens by the sampling kernel: what Sampler chooses, in two launches whatever the settings, after one that
looks for NaN and infinity."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.core.batch import Row, RowOutput, SamplerInit
from pdserve.worker.row_settings import RowSettings, banned_tokens, sampled_position
from pdserve.worker.sampler import NO_TOKEN, row_output
from pdserve.worker.seen_tokens import SeenTokens
from pdserve.worker.staging import Staging
from pdserve_kernels.decode_rows.kernel import advance
from pdserve_kernels.sampling.kernel import sample
from pdserve_kernels.sampling.reference import noise_stream
from pdserve_kernels.sampling.scores import CONTROLS, KNOBS


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a step's sampled rows want of their tokens."""

    rows: Sequence[Row]
    settings: Sequence[SamplerInit]
    banned: Sequence[tuple[int, ...]]
    masks: Sequence[bytes | None]

    def outputs(self, results: NDArray[np.float64]) -> list[RowOutput]:
        """results: (2, rows or more), tokens and logprobs as `advance` tells them."""
        tokens, logprobs = results[0].astype(np.int64).tolist(), results[1].tolist()
        for i, (banned, mask) in enumerate(zip(self.banned, self.masks, strict=True)):
            if tokens[i] in banned or not _allows(mask, tokens[i]):
                tokens[i] = NO_TOKEN  # nothing was left to choose from
        return [
            row_output(row, token, (value,) if init.logprobs else None)
            for row, init, token, value in zip(self.rows, self.settings, tokens, logprobs, strict=False)
        ]


class KernelSampler:
    """Samples rows of logits where they lie; the kernel itself adds what it chose to the histories of penalties."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._staging = Staging(device)
        self._seen = SeenTokens(vocab_size, device, torch.int32)
        self._settings = RowSettings(self._seen)

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        self._settings.drop(sequence_ids)

    def sample(self, logits: Tensor, rows: Sequence[Row], masks: Sequence[bytes | None] | None) -> list[RowOutput]:
        """As Sampler.sample."""
        asked = self.asked(rows, masks)
        tokens, logprobs, peaks = self.choose(logits, asked)
        nowhere = torch.full_like(tokens, -1)
        return asked.outputs(advance(nowhere[None], nowhere, tokens, logprobs, peaks, moves=False).cpu().numpy())

    def asked(self, rows: Sequence[Row], masks: Sequence[bytes | None] | None) -> Asked:
        """Settings that rows bring begin their histories anew. Raises ValueError for a row that never brought any."""
        settings = [self._settings.of(row) for row in rows]
        banned = [banned_tokens(row, init) for row, init in zip(rows, settings, strict=True)]
        return Asked(rows=rows, settings=settings, banned=banned, masks=masks or [None] * len(rows))

    def choose(self, logits: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their logprobs and each row's highest logit, all (rows,) on the device; nobody waits."""
        to_device = self._staging.to_device
        tokens, logprobs = sample(
            logits,
            to_device(_knobs(asked.settings)),
            to_device(self._controls(asked)),
            history=self._seen.table if len(self._seen.table) else None,
            allowed=to_device(self._allowed(asked.masks)) if any(mask is not None for mask in asked.masks) else None,
            banned=to_device(_banned(asked.banned)) if any(asked.banned) else None,
        )
        return tokens, logprobs, logits.amax(dim=1)

    def _controls(self, asked: Asked) -> NDArray[np.int64]:
        controls = np.empty((len(asked.rows), CONTROLS), dtype=np.int64)
        for i, (row, init) in enumerate(zip(asked.rows, asked.settings, strict=True)):
            controls[i] = (
                noise_stream(init.seed, init.sample_index),
                sampled_position(row),
                init.top_k,
                self._seen.row_of(row.sequence_id),
                asked.masks[i] is not None,
                len(asked.banned[i]),
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
