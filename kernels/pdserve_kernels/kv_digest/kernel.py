"""The keyed sum in Triton, over the memory of one device."""

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from pdserve_kernels.kv_digest import reference

TILE = 1024
PASSES = 8
PROGRAM_WORDS = TILE * PASSES
"""Words one program sums."""

_STEP = tl.constexpr(reference.STEP)
_FIRST_FACTOR = tl.constexpr(reference.FIRST_FACTOR)
_SECOND_FACTOR = tl.constexpr(reference.SECOND_FACTOR)


@triton.jit
def _mixed(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * _FIRST_FACTOR
    x = (x ^ (x >> 27)) * _SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def keyed_sum_kernel(
    words_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    TILE: tl.constexpr,
    PASSES: tl.constexpr,
) -> None:
    """shares [programs, 3] int64: first word, number of words, place of the first in the digest's order."""
    share = shares_ptr + 3 * tl.program_id(0)
    start, count, place = tl.load(share), tl.load(share + 1), tl.load(share + 2)
    key0 = tl.load(keys_ptr).to(tl.uint64, bitcast=True)
    key1 = tl.load(keys_ptr + 1).to(tl.uint64, bitcast=True)
    lane0 = tl.zeros((TILE,), dtype=tl.uint64)
    lane1 = tl.zeros((TILE,), dtype=tl.uint64)
    for turn in range(PASSES):
        index = turn * TILE + tl.arange(0, TILE).to(tl.int64)
        inside = index < count
        word = tl.load(words_ptr + start + index, mask=inside, other=0).to(tl.uint64, bitcast=True)
        step = (place + index).to(tl.uint64) * _STEP
        none = tl.zeros((TILE,), dtype=tl.uint64)
        lane0 += tl.where(inside, _mixed(word ^ (key0 + step)), none)
        lane1 += tl.where(inside, _mixed(word ^ (key1 + step)), none)
    # Addition of integers commutes: the sums are the same bits whoever comes first.
    tl.atomic_add(sums_ptr, tl.sum(lane0, 0).to(tl.int64, bitcast=True))
    tl.atomic_add(sums_ptr + 1, tl.sum(lane1, 0).to(tl.int64, bitcast=True))


def keyed_sum(memory: Tensor, offsets: NDArray[np.uint64], lengths: NDArray[np.uint64], seed: int) -> bytes:
    """The digest of spans of a contiguous one-dimensional uint8 tensor, computed where it lies; waits for it.

    offsets and lengths, shape [n], are in bytes. Raises ValueError when a span is not whole, aligned words.
    """
    if ((offsets | lengths) % reference.WORD_BYTES).any():
        raise ValueError(f"every span must begin and end at a multiple of the {reference.WORD_BYTES} bytes of a word")
    words = memory[: memory.numel() // reference.WORD_BYTES * reference.WORD_BYTES].view(torch.int64)
    keys = torch.from_numpy(reference.keys_of(seed).view(np.int64)).to(memory.device)
    shares = torch.from_numpy(_shares(offsets, lengths)).to(memory.device)
    sums = torch.zeros(2, dtype=torch.int64, device=memory.device)
    if len(shares):
        keyed_sum_kernel[(len(shares),)](words, keys, shares, sums, TILE=TILE, PASSES=PASSES)
    return reference.finished(sums.cpu().numpy().view(np.uint64), int(lengths.sum()))


def _shares(offsets: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The spans cut into one share per program; shape [programs, 3], see keyed_sum_kernel."""
    starts, counts = ((values // reference.WORD_BYTES).astype(np.int64) for values in (offsets, lengths))
    places = np.cumsum(counts) - counts
    programs = -(-counts // PROGRAM_WORDS)
    span = np.repeat(np.arange(len(counts)), programs)
    skipped = (np.arange(len(span)) - np.repeat(np.cumsum(programs) - programs, programs)) * PROGRAM_WORDS
    count = np.minimum(counts[span] - skipped, PROGRAM_WORDS)
    return np.stack((starts[span] + skipped, count, places[span] + skipped), axis=1)
