"""The innermost loop of products, in LLVM's own terms: Numba would not keep its sums in registers."""

from itertools import chain
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 64
"""Outputs at a time."""
GROUP = 6
"""Most rows at a time: 24 registers of sums and 4 of weights, out of 32."""

_LANES = 16
_VECTORS = TILE // _LANES
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """llvmlite has no name for it."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_FLOATS, _PAIRS = ir.VectorType(_F32, _LANES), ir.VectorType(_I32, _LANES)
_BFLOATS = ir.VectorType(_BFloat16(), 2 * _LANES)


def multiplies_bfloat16() -> bool:
    """Whether this processor has AVX512_BF16, without which there are no products of bfloat16."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


def tile_sums(rows: int) -> Any:
    """The intrinsic `sums(x, row, weight, tile, start, end, out)` for so many rows, at most GROUP: out[:rows]
    (GROUP, TILE) float32 becomes x[row : row + rows, start:end] times a tile of weight.

    x (any, depth) and weight (tiles, depth, TILE) flat, or in bfloat16 (tiles, depth / 2, TILE, 2), both as int16;
    start < end. Each output is a sum from start to end, one fused multiply-add after the other (bfloat16: one
    VDPBF16PS after the other, for pairs that begin at even places).
    """

    @intrinsic
    def sums(typing: Any, x: Any, row: Any, weight: Any, tile: Any, start: Any, end: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x_type, _, weight_type, _, _, _, out_type = signature.args
            x_at, row, weight_at, tile, start, end, out_at = args
            x = context.make_array(x_type)(context, builder, x_at)
            weight = context.make_array(weight_type)(context, builder, weight_at)
            out = context.make_array(out_type)(context, builder, out_at)
            depth = builder.extract_value(x.shape, 1)
            places = [builder.gep(x.data, [builder.mul(builder.add(row, _I64(i)), depth)]) for i in range(rows)]
            begin = builder.gep(weight.data, [builder.mul(builder.mul(tile, depth), _I64(TILE))])
            if x_type.dtype == types.float32:
                totals = _loop(builder, places, begin, start, end, _F32, _FLOATS, 1, _add_product)
            else:
                totals = _loop(builder, places, begin, start, end, _I32, _PAIRS, 2, _add_pairs)
            result = builder.bitcast(out.data, _FLOATS.as_pointer())
            for i, total in enumerate(totals):
                builder.store(total, builder.gep(result, [_I64(i)]), align=4)
            return context.get_dummy_value()

        place = types.int64
        return types.none(x, place, weight, place, place, place, out), codegen

    return sums


def _loop(
    builder: Any,
    places: list[Any],
    begin: Any,
    start: Any,
    end: Any,
    element: Any,
    vector: Any,
    step: int,
    add: Any,
) -> list[Any]:
    """Vectors of sums, row by row, over a depth from start to end. places: where each row's values begin; begin: where
    the tile's weights do."""
    entry, body, done = builder.block, builder.append_basic_block("depth"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(_I64)
    sums = [[builder.phi(_FLOATS) for _ in range(_VECTORS)] for _ in places]
    at = builder.bitcast(builder.gep(begin, [builder.mul(k, _I64(TILE))]), vector.as_pointer())
    weights = [builder.load(builder.gep(at, [_I64(i)]), align=4) for i in range(_VECTORS)]
    totals = []
    for place, row_sums in zip(places, sums, strict=True):
        value = builder.load(builder.bitcast(builder.gep(place, [k]), element.as_pointer()), align=2)
        everywhere = _spread(builder, value, vector)
        totals += [add(builder, everywhere, w, t) for w, t in zip(weights, row_sums, strict=True)]
    following = builder.add(k, _I64(step))
    builder.cbranch(builder.icmp_signed("<", following, end), body, done)
    k.add_incoming(start, entry)
    k.add_incoming(following, body)
    for phi, total in zip(chain.from_iterable(sums), totals, strict=True):
        phi.add_incoming(ir.Constant(_FLOATS, [0.0] * _LANES), entry)
        phi.add_incoming(total, body)
    builder.position_at_end(done)
    return totals


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """A value in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_PAIRS, [0] * _LANES))


def _add_product(builder: Any, x: Any, weight: Any, total: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS])
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")
    return builder.call(fma, [x, weight, total])


def _add_pairs(builder: Any, x: Any, weight: Any, total: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _BFLOATS, _BFLOATS])
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(dot, [total, builder.bitcast(x, _BFLOATS), builder.bitcast(weight, _BFLOATS)])
