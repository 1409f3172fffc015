"""Changes to scores before a token is chosen, with the semantics of transformers' logits processors."""

from collections.abc import Sequence

import torch
from torch import Tensor

_REMOVED = float("-inf")


def penalise_repetition(scores: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of seen tokens. scores, seen (rows, vocab); penalties (rows,)."""
    factor = penalties[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)


def filter_scores(scores: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """Set to -inf what top_k, then top_p, then min_p remove. scores (rows, vocab); one setting per row.

    top_k 0, top_p 1 and min_p 0 remove nothing; the best token always stays.
    """
    if any(top_k) or any(p < 1 for p in top_p):
        scores = _keep_top(scores, top_k, top_p)
    if any(min_p):
        scores = _keep_likely(scores, torch.tensor(min_p, device=scores.device)[:, None])
    return scores


def _keep_top(scores: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    vocab = scores.shape[1]
    ascending, order = scores.sort(dim=1, stable=True)
    weakest = torch.tensor([max(vocab - k, 0) if k else 0 for k in top_k], device=scores.device)
    ascending = ascending.masked_fill(ascending < ascending.gather(1, weakest[:, None]), _REMOVED)
    tail = torch.tensor([1 - p for p in top_p], device=scores.device)[:, None]
    removed = (ascending.softmax(dim=1).cumsum(dim=1) <= tail) & (tail > 0)
    removed[:, -1] = False
    removed |= ascending == _REMOVED
    return scores.masked_fill(removed.scatter(1, order, removed), _REMOVED)


def _keep_likely(scores: Tensor, min_p: Tensor) -> Tensor:
    probabilities = scores.softmax(dim=1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(dim=1, keepdim=True), _REMOVED)
