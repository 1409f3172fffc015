"""Products of few rows with a weight whose outputs lie in tiles, as oneDNN packs it for AVX-512.

M rows, depth K and N outputs of b bytes need 2·M·K·N operations and read b·K·N bytes, once and in one stream: a tile's
sums stay in registers while its depth goes by, and further groups of rows find the tile in the cache. At 26 GB/s and
113 GFLOP/s of a core the bytes decide up to 8 rows in float32.
"""

from typing import Any

import numpy as np

from pdserve_kernels.cpu.elements import compiled_in_order, inlined, narrow, widen
from pdserve_kernels.cpu.tile_sums import GROUP, TILE, tile_sums

_one, _two, _three, _four, _five, _six = (tile_sums(rows) for rows in range(1, GROUP + 1))


@inlined
def _sum(rows: Any, x: Any, row: Any, weight: Any, tile: Any, start: Any, end: Any, out: Any) -> None:
    if rows == 1:
        _one(x, row, weight, tile, start, end, out)
    elif rows == 2:
        _two(x, row, weight, tile, start, end, out)
    elif rows == 3:
        _three(x, row, weight, tile, start, end, out)
    elif rows == 4:
        _four(x, row, weight, tile, start, end, out)
    elif rows == 5:
        _five(x, row, weight, tile, start, end, out)
    else:
        _six(x, row, weight, tile, start, end, out)


@compiled_in_order
def product(x: Any, weight: Any, bias: Any, biased: Any, part: Any, out: Any) -> None:
    """x (rows, depth), weight as for tile_sums, bias (width,), added if biased; out (rows, width).

    An output is the sum of its sums over parts of the depth, `part` long but for the last, from first to last.
    bfloat16 needs an even depth and part, and multiplies_bfloat16.
    """
    rows, depth = x.shape
    width = out.shape[1]
    groups = -(-rows // GROUP)
    sums, total = np.empty((GROUP, TILE), np.float32), np.empty((GROUP, TILE), np.float32)
    for tile in range(-(-width // TILE)):
        first = tile * TILE
        count = min(TILE, width - first)
        row = 0
        for group in range(groups):
            members = (rows - row) // (groups - group)
            _sum(members, x, row, weight, tile, 0, min(part, depth), total)
            for start in range(part, depth, part):
                _sum(members, x, row, weight, tile, start, min(start + part, depth), sums)
                for member in range(members):
                    for j in range(TILE):
                        total[member, j] += sums[member, j]
            for member in range(members):
                for j in range(count):
                    value = total[member, j]
                    if biased:
                        value += widen(bias[first + j])
                    out[row + member, first + j] = narrow(value, out)
            row += members
