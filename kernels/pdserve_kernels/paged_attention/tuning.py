"""Sizes of the kernel, by purpose and head dimension. Chosen from what the compiler reports for Hopper (registers,
shared memory, wgmma); benchmarks/gpu/attention.py measures them."""

from dataclasses import dataclass, replace
from enum import StrEnum

FIXED_SPLIT = 1024
"""KV tokens of a part where results must not depend on the rest of the step."""


class Purpose(StrEnum):
    """DECODE: few query rows per sequence, bound by bandwidth. PREFILL: many, bound by compute. INVARIANT: any
    number; results follow from a token's own KV alone, so all tokens take this one way."""

    DECODE = "decode"
    PREFILL = "prefill"
    INVARIANT = "invariant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """rows: of a query tile, its tokens times the query heads per KV head. kv_tile: KV tokens. programs: how many share
    a multiprocessor. fold, fold_dim: how many states of parts are folded side by side, how many columns at a time.
    """

    rows: int
    kv_tile: int
    num_warps: int
    num_stages: int
    programs: int = 1
    fold: int = 2
    fold_dim: int = 32


_DECODE = {
    64: Tuning(rows=16, kv_tile=128, num_warps=4, num_stages=5, programs=2, fold=8, fold_dim=64),
    128: Tuning(rows=16, kv_tile=64, num_warps=4, num_stages=5, programs=2, fold=8, fold_dim=128),
    256: Tuning(rows=16, kv_tile=32, num_warps=4, num_stages=5, programs=2, fold=4, fold_dim=256),
}
_PREFILL = {
    64: Tuning(rows=128, kv_tile=128, num_warps=8, num_stages=4),
    128: Tuning(rows=128, kv_tile=64, num_warps=8, num_stages=4),
    256: Tuning(rows=128, kv_tile=32, num_warps=8, num_stages=3),
}
_INVARIANT = {
    64: Tuning(rows=64, kv_tile=64, num_warps=4, num_stages=4, programs=2),
    128: Tuning(rows=64, kv_tile=64, num_warps=8, num_stages=4),
    256: Tuning(rows=64, kv_tile=32, num_warps=8, num_stages=4),
}
_TABLES = {Purpose.DECODE: _DECODE, Purpose.PREFILL: _PREFILL, Purpose.INVARIANT: _INVARIANT}
_FLOAT32 = Tuning(rows=16, kv_tile=32, num_warps=4, num_stages=2)
"""For every purpose: float32 is for comparisons, not for speed."""


def tuning_for(purpose: Purpose, head_dim: int, group: int, itemsize: int) -> Tuning:
    """group: query heads per KV head; itemsize: bytes of an element. Raises ValueError beyond a head_dim of 256."""
    dim = max(64, padded(head_dim))
    if dim not in _DECODE:
        raise ValueError(f"paged attention supports head dimensions up to 256, not {head_dim}")
    tuning = _FLOAT32 if itemsize == 4 else _TABLES[purpose][dim]
    return replace(tuning, rows=max(tuning.rows, 1 << (group - 1).bit_length()))


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that head_dim is computed in."""
    return max(16, 1 << (head_dim - 1).bit_length())
