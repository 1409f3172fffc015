"""Sampling in Triton: one pass over all rows split among programs, then one program per row that decides."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdserve_kernels.sampling import reference
from pdserve_kernels.sampling.scores import CONTROLS, KNOBS, kth_largest, row_scores

TILE = 1024
SPLIT_TILES = 8
"""Tiles one program of the first pass reads."""
CHOOSE_TILE = 2048
CHOOSE_WARPS = 16
"""The second pass has one program per row: wide, to draw on L2."""

_STEP = tl.constexpr(reference.STEP)
_FIRST_FACTOR = tl.constexpr(reference.FIRST_FACTOR)
_SECOND_FACTOR = tl.constexpr(reference.SECOND_FACTOR)
_KNOBS = tl.constexpr(KNOBS)
_CONTROLS = tl.constexpr(CONTROLS)
_PURPOSE = tl.constexpr(reference.TOKEN_PURPOSE)
_ULP = tl.constexpr(2.0**-52)
_SLACK = tl.constexpr(1e-9)
"""More than rounding can make a bound on noise too small by."""
_NO_TOKEN = tl.constexpr(1 << 40)


@triton.jit
def _mixed(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * _FIRST_FACTOR
    x = (x ^ (x >> 27)) * _SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def _gumbel(bits: tl.tensor) -> tl.tensor:
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * _ULP))


@triton.jit
def _better(
    best: tl.tensor,
    winner: tl.tensor,
    level: tl.tensor,
    scores: tl.tensor,
    token: tl.tensor,
    stream: tl.tensor,
    position: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(best noisy score, its token, that token's score), or what of this tile beats it; -inf may not win.

    Noise rises with its bits, so the tile's best score and largest bits bound what it can hold: only a tile that could
    win pays for logarithms.
    """
    start = tl.zeros_like(token).to(tl.uint64) + stream.to(tl.uint64, bitcast=True)
    key = _mixed(_mixed(start + position.to(tl.uint64, bitcast=True) + _STEP) + _PURPOSE + _STEP)
    bits = (_mixed(key + (token + 1).to(tl.uint64) * _STEP) >> 12).to(tl.int64)
    bound = tl.max(scores, 0).to(tl.float64) + _gumbel(tl.max(bits, 0))
    if bound + _SLACK >= best:
        noisy = scores.to(tl.float64) + _gumbel(bits)
        tile_best = tl.max(noisy, 0)
        if tile_best > best:
            best = tile_best
            winner = tl.min(tl.where(noisy == tile_best, token, _NO_TOKEN), 0)
            level = tl.max(tl.where(token == winner, scores, float("-inf")), 0)
    return best, winner, level


@triton.jit(do_not_specialize=["banned_width"])
def scan_kernel(
    logits_ptr: tl.tensor,
    knobs_ptr: tl.tensor,
    controls_ptr: tl.tensor,
    history_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    banned_ptr: tl.tensor,
    best_ptr: tl.tensor,
    winner_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    vocab: tl.tensor,
    banned_width: tl.tensor,
    TILE: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
) -> None:
    """Of each row and split, shape [rows, splits]: the best noisy score and its token, where nothing filters the row
    (the best score, where it is greedy); the best score; log Σ exp(logits)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = (logits_ptr, knobs_ptr, controls_ptr, history_ptr, allowed_ptr, banned_ptr, banned_width)
    knobs, controls = knobs_ptr + row * _KNOBS, controls_ptr + row * _CONTROLS
    temperature = tl.load(knobs)
    stream, position = tl.load(controls), tl.load(controls + 1)
    filtered = _is_filtered(knobs, controls)
    best = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), 0, tl.int64)
    peak = tl.full((), float("-inf"), tl.float32)
    logit_peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0, tl.float32)
    for tile in range(tl.minimum(SPLIT_TILES, tl.cdiv(vocab, TILE) - split * SPLIT_TILES)):
        token = ((split * SPLIT_TILES + tile) * TILE + tl.arange(0, TILE)).to(tl.int64)
        logits, scores = row_scores(source, row, token, vocab)
        tile_peak = tl.max(scores, 0)
        if temperature == 0:
            if tile_peak > peak:
                best = tile_peak.to(tl.float64)
                winner = tl.min(tl.where(scores == tile_peak, token, _NO_TOKEN), 0)
        elif not filtered:
            best, winner, _level = _better(best, winner, peak, scores, token, stream, position)
        peak = tl.maximum(peak, tile_peak)
        higher = tl.maximum(logit_peak, tl.max(logits, 0))
        if higher > float("-inf"):
            total = total * tl.exp(logit_peak - higher) + tl.sum(tl.exp(logits - higher), 0)
            logit_peak = higher
    at = row * tl.num_programs(1) + split
    tl.store(best_ptr + at, best)
    tl.store(winner_ptr + at, winner)
    tl.store(peak_ptr + at, peak)
    tl.store(log_sum_ptr + at, tl.where(total > 0, logit_peak + tl.log(total), float("-inf")))


@triton.jit
def _is_filtered(knobs: tl.tensor, controls: tl.tensor) -> tl.tensor:
    return (tl.load(controls + 2) > 0) | (tl.load(knobs + 4) < 1) | (tl.load(knobs + 5) > 0)


@triton.jit
def _above(
    source: tl.tuple,
    row: tl.tensor,
    vocab: tl.tensor,
    floor: tl.tensor,
    level: tl.tensor,
    chosen: tl.tensor,
    peak: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of the tokens with a score of at least floor that rank above `chosen`, whose score is level: their mass, and
    of those min-p keeps, the winner and its score; winner -1 if there is none."""
    knobs, controls = source[1] + row * _KNOBS, source[2] + row * _CONTROLS
    min_p = tl.load(knobs + 5)
    stream, position = tl.load(controls), tl.load(controls + 1)
    mass = tl.zeros((TILE,), tl.float64)
    best = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), -1, tl.int64)
    winner_level = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        token = (start + tl.arange(0, TILE)).to(tl.int64)
        _logits, scores = row_scores(source, row, token, vocab)
        in_reach = (scores > level) | ((scores == level) & (token > chosen))
        in_reach &= (scores >= floor) & (scores > float("-inf"))
        weight = tl.where(in_reach, tl.exp(scores - peak), 0.0)
        mass += weight.to(tl.float64)
        candidates = tl.where(in_reach & (weight >= min_p), scores, float("-inf"))
        if tl.max(candidates, 0) > float("-inf"):
            best, winner, winner_level = _better(best, winner, winner_level, candidates, token, stream, position)
    return tl.sum(mass, 0), winner, winner_level


@triton.jit(do_not_specialize=["banned_width"])
def choose_kernel(
    logits_ptr: tl.tensor,
    knobs_ptr: tl.tensor,
    controls_ptr: tl.tensor,
    history_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    banned_ptr: tl.tensor,
    best_ptr: tl.tensor,
    winner_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    vocab: tl.tensor,
    banned_width: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """tokens [rows] and their logprobs [rows] under the plain logits; adds the tokens to the rows' history."""
    row = tl.program_id(0).to(tl.int64)
    source = (logits_ptr, knobs_ptr, controls_ptr, history_ptr, allowed_ptr, banned_ptr, banned_width)
    knobs, controls = knobs_ptr + row * _KNOBS, controls_ptr + row * _CONTROLS
    split = tl.arange(0, SPLITS)
    inside, at = split < splits, row * splits + split
    best = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
    winner = tl.load(winner_ptr + at, mask=inside, other=_NO_TOKEN)
    chosen = tl.min(tl.where(best == tl.max(best, 0), winner, _NO_TOKEN), 0)
    peak = tl.max(tl.load(peak_ptr + at, mask=inside, other=float("-inf")), 0)
    log_sums = tl.load(log_sum_ptr + at, mask=inside, other=float("-inf"))
    highest = tl.max(log_sums, 0)
    log_sum = highest + tl.log(tl.sum(tl.exp(log_sums - highest), 0))

    if (tl.load(knobs) > 0) & _is_filtered(knobs, controls) & (peak > float("-inf")):
        top_k, top_p = tl.load(controls + 2), tl.load(knobs + 4).to(tl.float64)
        floor = tl.full((), float("-inf"), tl.float32)
        if (top_k > 0) & (top_k < vocab):
            floor = kth_largest(source, row, vocab, top_k, TILE)
        none = tl.full((), -1, tl.int64)
        mass, chosen, level = _above(source, row, vocab, floor, floor, none, peak, TILE)
        searching = top_p < 1
        while searching:
            mass_above, higher, higher_level = _above(source, row, vocab, floor, level, chosen, peak, TILE)
            searching = (mass_above >= top_p * mass) & (higher >= 0)
            chosen = tl.where(searching, higher, chosen)
            level = tl.where(searching, higher_level, level)

    chosen = tl.maximum(chosen, 0)  # -1 where NaN hides all candidates: its history would be another row's
    tl.store(tokens_ptr + row, chosen)
    logit = tl.load(logits_ptr + row * vocab + chosen).to(tl.float32)
    tl.store(logprobs_ptr + row, logit - log_sum)
    history_row = tl.load(controls + 3)
    if history_row >= 0:
        seen = history_ptr + history_row * vocab + chosen
        tl.store(seen, tl.load(seen) + 2)


def sample(
    logits: Tensor,
    knobs: Tensor,
    controls: Tensor,
    *,
    history: Tensor | None = None,
    allowed: Tensor | None = None,
    banned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row, (rows,) int64, and its log probability under the plain logits, (rows,) float32.

    logits (rows, vocab), contiguous, of any float dtype; knobs (rows, KNOBS) float32; controls (rows, CONTROLS) int64;
    history (history rows, vocab) int32, to which the chosen tokens are added; allowed (rows, ceil(vocab / 32)) and
    banned (rows, any) int32: see scores.py. What no row refers to may be None. Two launches, no host involved.
    A row with NaN, or with nothing left to choose from, gets some token, which is for the caller to discard.
    """
    rows, vocab = logits.shape
    if not logits.is_contiguous() or knobs.shape != (rows, KNOBS) or controls.shape != (rows, CONTROLS):
        raise ValueError(f"logits must be contiguous, with {KNOBS} knobs and {CONTROLS} controls for each row")
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return tokens, logprobs
    splits = triton.cdiv(vocab, TILE * SPLIT_TILES)
    best = torch.empty(rows, splits, dtype=torch.float64, device=device)
    winner = torch.empty(rows, splits, dtype=torch.int64, device=device)
    peak, log_sum = (torch.empty(rows, splits, dtype=torch.float32, device=device) for _ in range(2))
    unused = controls.view(torch.int32)  # of their dtype: one compiled kernel serves all rows
    source = (logits, knobs, controls, *(unused if t is None else t for t in (history, allowed, banned)))
    partial = (best, winner, peak, log_sum)
    width = 0 if banned is None else banned.shape[1]
    scan_kernel[(rows, splits)](*source, *partial, vocab, width, TILE=TILE, SPLIT_TILES=SPLIT_TILES)
    choose_kernel[(rows,)](
        *source,
        *partial,
        tokens,
        logprobs,
        vocab,
        width,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        TILE=CHOOSE_TILE,
        num_warps=CHOOSE_WARPS,
    )
    return tokens, logprobs
