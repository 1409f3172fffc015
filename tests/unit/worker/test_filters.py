"""Each filter against the logits processor of transformers it promises to equal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.worker.filters import filter_scores, penalise_repetition

ROWS, VOCAB = 6, 200


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def oracle(scores: Tensor, *processors: Callable[..., Any]) -> Tensor:
    result: Tensor = LogitsProcessorList(processors)(torch.zeros(len(scores), 1, dtype=torch.int64), scores)
    return result


@pytest.mark.parametrize("top_k", [1, 5, 199, 200, 500])
def test_top_k(scores: Tensor, top_k: int) -> None:
    ours = filter_scores(scores, [top_k] * ROWS, [1.0] * ROWS, [0.0] * ROWS)
    assert torch.equal(ours, oracle(scores, TopKLogitsWarper(top_k)))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p(scores: Tensor, top_p: float) -> None:
    ours = filter_scores(scores, [0] * ROWS, [top_p] * ROWS, [0.0] * ROWS)
    assert torch.equal(ours, oracle(scores, TopPLogitsWarper(top_p)))


@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.9, 1.0])
def test_min_p(scores: Tensor, min_p: float) -> None:
    ours = filter_scores(scores, [0] * ROWS, [1.0] * ROWS, [min_p] * ROWS)
    assert torch.equal(ours, oracle(scores, MinPLogitsWarper(min_p)))


def test_all_in_the_order_top_k_top_p_min_p(scores: Tensor) -> None:
    ours = filter_scores(scores, [50] * ROWS, [0.8] * ROWS, [0.05] * ROWS)
    assert torch.equal(ours, oracle(scores, TopKLogitsWarper(50), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)))


def test_ties_at_the_top_k_border_all_stay() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    kept = filter_scores(scores, [2], [1.0], [0.0])
    assert kept.isfinite().tolist() == [[True, True, True, True, False]]


def test_each_row_has_its_own_settings(scores: Tensor) -> None:
    top_k, top_p, min_p = [0, 5, 0, 0, 20, 1], [1.0, 1.0, 0.7, 1.0, 0.9, 1.0], [0.0, 0.0, 0.0, 0.2, 0.1, 0.0]
    together = filter_scores(scores, top_k, top_p, min_p)
    for i in range(ROWS):
        alone = filter_scores(scores[i : i + 1], top_k[i : i + 1], top_p[i : i + 1], min_p[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)
    assert torch.equal(together[0], scores[0])


def test_switched_off_filters_change_nothing_even_after_bans(scores: Tensor) -> None:
    scores[:, 7] = float("-inf")
    assert torch.equal(filter_scores(scores, [0] * ROWS, [1.0] * ROWS, [0.0] * ROWS), scores)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(scores: Tensor, penalty: float) -> None:
    history = torch.randint(VOCAB, (ROWS, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter(1, history, True)
    ours = penalise_repetition(scores, seen, torch.full((ROWS,), penalty))
    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(penalty)(history, scores))
