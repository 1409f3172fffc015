"""How a product is cut into programs: a decision, pure."""

from dataclasses import dataclass

MULTIPROCESSORS = 132
"""Of an H200. A number of splits follows from it and not from the device at hand: bits may not depend on that."""
MAX_SPLITS = 16
MIN_SPLIT_DEPTH = 512
"""A split shorter than this costs more in being added up than it gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Tiles of block_m rows and block_n columns, the depth in steps of block_k, divided among splits programs."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def tiling(rows: int, columns: int, depth: int, *, gated: bool, deterministic: bool, element_size: int = 2) -> Tiling:
    """For an output of rows × columns, of elements of so many bytes. deterministic: the same for any number of rows.

    A gated product holds two tiles of output, so its tiles have half the columns.
    """
    block_m = 16 if deterministic else next((m for m in (16, 32, 64) if rows <= m), 128)
    block_n = 64 if gated else 128
    if block_m <= 32:
        block_n //= 2
    tiles = -(-columns // block_n) * (1 if deterministic else -(-rows // block_m))
    splits = 1
    while splits < MAX_SPLITS and 2 * tiles * splits < 3 * MULTIPROCESSORS and depth // (2 * splits) >= MIN_SPLIT_DEPTH:
        splits *= 2
    wide = block_m >= 64
    return Tiling(
        block_m=block_m,
        block_n=block_n,
        block_k=(128 if wide else 256) // element_size,
        splits=splits,
        num_warps=8 if block_m == 128 else 4,
        num_stages=4,
    )
