"""Choosing tokens. A choice depends on the row's logits, the sequence's own state and its key, never on the batch."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pdserve.core.batch import Row, RowOutput, SamplerInit
from pdserve.worker.filters import filter_scores, penalise_repetition
from pdserve.worker.noise import Purpose, gumbel_noise, noise_key
from pdserve.worker.row_settings import RowSettings, banned_tokens, sampled_position
from pdserve.worker.seen_tokens import SeenTokens

NO_TOKEN = -1
"""Stands for a row that has none."""

_REMOVED = float("-inf")


class Sampler:
    """Samples rows of logits and keeps per sequence what the repetition penalty must remember."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._seen = SeenTokens(vocab_size, device)
        self._settings = RowSettings(self._seen)

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        self._settings.drop(sequence_ids)

    def sample(self, logits: Tensor, rows: Sequence[Row], masks: Sequence[bytes | None] | None) -> list[RowOutput]:
        """One token per row, or none where the best score is not finite: logits of NaN or infinity, or a mask that
        allows nothing. logits (rows, vocab) float32; the token stands at position start + num_tokens.

        masks: per row, None or the allowed tokens as bits, token 0 in the lowest bit of the first byte.
        """
        settings = [self._settings.of(row) for row in rows]
        scores = self._adjusted(logits, rows, settings, masks)
        chosen = scores.argmax(dim=1)
        # argmax takes a NaN for the greatest, so one look at what it found tells of all.
        usable = scores.gather(1, chosen[:, None]).squeeze(1).isfinite()
        drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
        if drawn:
            chosen[drawn] = _draw(
                scores[drawn], [settings[i] for i in drawn], [sampled_position(rows[i]) for i in drawn]
            )
        token_ids = torch.where(usable, chosen, NO_TOKEN).tolist()
        for row, token_id in zip(rows, token_ids, strict=True):
            if row.sequence_id in self._seen and token_id != NO_TOKEN:
                self._seen.add(row.sequence_id, token_id)
        logprobs = _logprobs(logits, chosen, settings)
        return [
            row_output(row, token_id, logprobs.get(i))
            for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
        ]

    def _adjusted(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        settings: Sequence[SamplerInit],
        masks: Sequence[bytes | None] | None,
    ) -> Tensor:
        """Logits after repetition penalty, bans and masks; a copy unless there are none."""
        penalised = [i for i, s in enumerate(settings) if s.repetition_penalty != 1]
        banned = {i: tokens for i, row in enumerate(rows) if (tokens := banned_tokens(row, settings[i]))}
        if not (penalised or banned or any(masks or ())):
            return logits
        scores = logits.clone()
        if penalised:
            seen = self._seen.of([rows[i].sequence_id for i in penalised])
            factors = torch.tensor([settings[i].repetition_penalty for i in penalised], device=self._device)
            scores[penalised] = penalise_repetition(scores[penalised], seen, factors)
        for i, tokens in banned.items():
            scores[i, list(tokens)] = _REMOVED
        _apply_masks(scores, masks)
        return scores


def row_output(row: Row, token_id: int, logprobs: tuple[float, ...] | None = None) -> RowOutput:
    """token_id may be NO_TOKEN."""
    if token_id == NO_TOKEN:
        return RowOutput(sequence_id=row.sequence_id, token_ids=())
    return RowOutput(sequence_id=row.sequence_id, token_ids=(token_id,), logprobs=logprobs)


def _draw(scores: Tensor, settings: Sequence[SamplerInit], positions: Sequence[int]) -> Tensor:
    """Gumbel-max: the argmax of filtered scores plus Gumbel noise is a sample of their softmax."""
    temperatures = torch.tensor([s.temperature for s in settings], device=scores.device)
    kept = filter_scores(
        scores / temperatures[:, None],
        [s.top_k for s in settings],
        [s.top_p for s in settings],
        [s.min_p for s in settings],
    )
    keys = [
        noise_key(s.seed, s.sample_index, position, Purpose.TOKEN)
        for s, position in zip(settings, positions, strict=True)
    ]
    noise = gumbel_noise(torch.tensor(keys, dtype=torch.int64, device=scores.device), scores.shape[1])
    return (kept + noise).argmax(dim=1)


def _logprobs(logits: Tensor, chosen: Tensor, settings: Sequence[SamplerInit]) -> dict[int, tuple[float, ...]]:
    """Log probabilities of the chosen tokens before any change to the logits, for the rows that ask."""
    asked = [i for i, s in enumerate(settings) if s.logprobs]
    if not asked:
        return {}
    values = logits[asked].log_softmax(dim=1).gather(1, chosen[asked][:, None]).squeeze(1)
    return {i: (value,) for i, value in zip(asked, values.tolist(), strict=True)}


def _apply_masks(scores: Tensor, masks: Sequence[bytes | None] | None) -> None:
    for i, mask in enumerate(masks or ()):
        if mask is not None:
            packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8).to(scores.device)
            bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=scores.device) & 1
            scores[i].masked_fill_(bits.flatten()[: scores.shape[1]] == 0, _REMOVED)
