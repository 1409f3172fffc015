"""Scores of a row, computed anew in every pass: reading logits again from L2 costs less than writing scores out."""

import triton
import triton.language as tl

KNOBS = 6
"""float32 settings of a row: temperature, repetition, frequency and presence penalty, top_p, min_p."""
CONTROLS = 6
"""int64 settings of a row: noise stream, position, top_k, row of its history or -1, whether the mask of allowed
tokens holds for it, number of banned tokens."""

_KNOBS = tl.constexpr(KNOBS)
_CONTROLS = tl.constexpr(CONTROLS)


@triton.jit
def row_scores(source: tl.tuple, row: tl.tensor, token: tl.tensor, vocab: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Logits and scores (after temperature) of some of a row's tokens, -inf beyond the vocabulary.

    source: logits [rows, vocab]; knobs [rows, KNOBS]; controls [rows, CONTROLS]; history [history rows, vocab] int32;
    allowed [rows, ceil(vocab / 32)] int32, token 0 in the lowest bit of the first; banned [rows, banned_width] int32;
    banned_width.
    """
    logits_ptr, knobs_ptr, controls_ptr, history_ptr, allowed_ptr, banned_ptr, banned_width = source
    knobs, controls = knobs_ptr + row * _KNOBS, controls_ptr + row * _CONTROLS
    inside = token < vocab
    logits = tl.load(logits_ptr + row * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
    scores = logits
    history_row = tl.load(controls + 3)
    if history_row >= 0:
        repetition, frequency, presence = tl.load(knobs + 1), tl.load(knobs + 2), tl.load(knobs + 3)
        history = tl.load(history_ptr + history_row * vocab + token, mask=inside, other=0)
        # Divided as IEEE 754 has it, so that the host gets the same score.
        penalised = tl.where(scores < 0, scores * repetition, tl.div_rn(scores, tl.zeros_like(scores) + repetition))
        scores = tl.where(history > 0, penalised, scores)
        times = (history >> 1).to(tl.float32)
        scores = tl.where(history > 1, scores - frequency * times - presence, scores)
    for i in range(tl.load(controls + 5).to(tl.int32)):
        scores = tl.where(token == tl.load(banned_ptr + row * banned_width + i), float("-inf"), scores)
    if tl.load(controls + 4) > 0:
        words = (vocab + 31) // 32
        word = tl.load(allowed_ptr + row * words + token // 32, mask=inside, other=0)
        scores = tl.where(((word >> (token % 32).to(tl.int32)) & 1) != 0, scores, float("-inf"))
    temperature = tl.load(knobs)
    if temperature > 0:
        scores = tl.div_rn(scores, tl.zeros_like(scores) + temperature)
    return logits, scores


@triton.jit
def kth_largest(source: tl.tuple, row: tl.tensor, vocab: tl.tensor, k: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """The k-th largest score of a row, by counting digits of eight bits from the highest down; 0 < k <= vocab.

    As integers, the bits of floats order as the floats do once negative ones are inverted and positive ones raised.
    """
    prefix = tl.full((), 0, tl.int64)
    missing = k
    digit = tl.arange(0, 256)
    for turn in range(4):
        shift = 24 - 8 * turn
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, vocab, TILE):
            token = (start + tl.arange(0, TILE)).to(tl.int64)
            _logits, scores = row_scores(source, row, token, vocab)
            bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
            rank = tl.where(bits < 0, -1 - bits, bits + 2147483648) & 0xFFFFFFFF
            counted = (token < vocab) & ((rank >> (shift + 8)) == (prefix >> (shift + 8)))
            counts += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=counted)
        from_above = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        found = tl.max(tl.where(from_above >= missing, digit, 0), 0)
        missing -= tl.sum(tl.where(digit > found, counts, 0), 0)
        prefix |= found.to(tl.int64) << shift
    bits = tl.where(prefix >= 2147483648, prefix - 2147483648, -1 - prefix)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)
