"""Copying and digesting spans of host memory: one call for many, beside other threads of Python.

A thread that comes back for the interpreter's lock after every span keeps the event loop from it for milliseconds. Only
without Numba, and for digests of odd lengths, which layouts of real models do not have, are spans taken one by one.
"""

import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import islice

import numpy as np
import xxhash
from numpy.typing import NDArray

from pdserve.transfer.base import Offsets
from pdserve.transfer.spans import spans_fit

Bytes = NDArray[np.uint8]
"""One-dimensional and contiguous."""

_COMPILED = find_spec("numba") is not None


def copy_spans(source: Bytes, target: Bytes, sources: Offsets, targets: Offsets, lengths: Offsets) -> None:
    """lengths[i] bytes from sources[i] to targets[i]. Raises ValueError, before the first byte, when some are not
    there."""
    _check("source", source, sources, lengths)
    _check("target", target, targets, lengths)
    _copy(source, target, sources, targets, lengths)


def digest_spans(memory: Bytes, offsets: Offsets, lengths: Offsets, seeds: Sequence[int]) -> list[bytes]:
    """xxh3-128 of the spans, of equally many for each seed of 64 bits. Raises ValueError when some are not there."""
    _check("digested", memory, offsets, lengths)
    if not _may_compile(lengths):
        return _digest_singly(memory, offsets, lengths, seeds)
    from pdserve_kernels.cpu import spans as kernels

    digests = np.empty((len(seeds), 2), dtype=np.uint64)
    kernels.digest(_address(memory), offsets, lengths, np.array(seeds, dtype=np.uint64), digests)
    return _as_bytes(digests)


def copy_and_digest_spans(
    source: Bytes, target: Bytes, sources: Offsets, targets: Offsets, lengths: Offsets, seeds: Sequence[int]
) -> tuple[list[bytes], float]:
    """As copy_spans, and as digest_spans of the target; and how many of the seconds the digests took."""
    _check("source", source, sources, lengths)
    _check("target", target, targets, lengths)
    if not _may_compile(lengths):
        _copy(source, target, sources, targets, lengths)
        begun = time.perf_counter()
        return _digest_singly(target, targets, lengths, seeds), time.perf_counter() - begun
    from pdserve_kernels.cpu import spans as kernels

    digests = np.empty((len(seeds), 2), dtype=np.uint64)
    nanoseconds = kernels.copy_and_digest(
        _address(source), _address(target), sources, targets, lengths, np.array(seeds, dtype=np.uint64), digests
    )
    return _as_bytes(digests), nanoseconds / 1e9


def warm_up() -> None:
    """Have everything compiled: takes seconds on a machine that has never run it."""
    memory = np.zeros(1 << 10, dtype=np.uint8)
    zero, length = np.zeros(1, dtype=np.uint64), np.full(1, memory.nbytes, dtype=np.uint64)
    copy_spans(memory, memory.copy(), zero, zero, length)
    copy_and_digest_spans(memory, memory.copy(), zero, zero, length, (0,))
    digest_spans(memory, zero, length, (0,))


def _check(name: str, memory: Bytes, offsets: Offsets, lengths: Offsets) -> None:
    if _COMPILED and offsets.shape == lengths.shape:
        from pdserve_kernels.cpu import spans as kernels

        fit = bool(kernels.all_fit(np.uint64(memory.nbytes), offsets, lengths))
    else:
        fit = spans_fit(memory.nbytes, offsets, lengths)
    if not fit:
        raise ValueError(f"a span reaches beyond the {memory.nbytes} bytes of the {name} memory")


def _may_compile(lengths: Offsets) -> bool:
    if not _COMPILED:
        return False
    from pdserve_kernels.cpu import spans as kernels

    return bool(kernels.all_whole(lengths))


def _address(memory: Bytes) -> np.uint64:
    return np.uint64(memory.ctypes.data)


def _as_bytes(digests: NDArray[np.uint64]) -> list[bytes]:
    return [digest.tobytes() for digest in digests.astype(">u8")]


def _copy(source: Bytes, target: Bytes, sources: Offsets, targets: Offsets, lengths: Offsets) -> None:
    if _COMPILED:
        from pdserve_kernels.cpu import spans as kernels

        kernels.copy(_address(source), _address(target), sources, targets, lengths)
        return
    for there, here, length in zip(sources.tolist(), targets.tolist(), lengths.tolist(), strict=True):
        target[here : here + length] = source[there : there + length]


def _digest_singly(memory: Bytes, offsets: Offsets, lengths: Offsets, seeds: Sequence[int]) -> list[bytes]:
    each = len(lengths) // max(1, len(seeds))
    spans = zip(offsets.tolist(), lengths.tolist(), strict=True)
    return [_digest_one(memory, islice(spans, each), seed) for seed in seeds]


def _digest_one(memory: Bytes, spans: Iterable[tuple[int, int]], seed: int) -> bytes:
    digest = xxhash.xxh3_128(seed=seed)
    for offset, length in spans:
        digest.update(memory[offset : offset + length].data)
    return bytes(digest.digest())
