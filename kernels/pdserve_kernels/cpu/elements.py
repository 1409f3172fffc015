"""Numbers in kernels: all arithmetic is in float32, whatever arrays hold."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

REORDERED = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered for vector registers, always in the same way; NaN and infinity keep their meaning."""

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_QUIET_NAN = 0x7FC0


def compiled(function: Any) -> Any:
    """A kernel. It runs beside other threads of Python; its machine code is kept on disk where that can be written."""
    return _compiled(function, REORDERED)


def compiled_in_order(function: Any) -> Any:
    """A kernel whose sums are taken as they are written."""
    return _compiled(function, False)


def _compiled(function: Any, fastmath: Any) -> Any:
    options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor a cache of the user's is writable
        return njit(**options)(function)


inlined = njit(fastmath=REORDERED, error_model="numpy", inline="always")
"""A part of kernels. Numba makes one function of a kernel and its parts: of a part compiled by itself, the process that
compiles it and one that has it from the cache make different machine code, where other products are fused with sums."""


@intrinsic
def widen(typing: Any, element: Any) -> Any:
    """An element of an array as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if element == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _F32)

    return types.float32(element), codegen


@intrinsic
def narrow(typing: Any, value: Any, array: Any) -> Any:
    """A float32 as an element of an array, rounded to the nearest, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if array.dtype == types.float32:
            return args[0]
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        kept = builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), _I16(_QUIET_NAN), kept)

    return array.dtype(types.float32, array), codegen


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """2 to an int32 between -126 and 127."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(args[0], _I32(127)), _I32(23)), _F32)

    return types.float32(types.int32), codegen


@inlined
def exponential(x: Any) -> Any:
    """e to a float32, clamped to ±87; within 2 units in the last place (Cephes' expf). NaN stays NaN."""
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(87) if x > np.float32(87) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * _power_of_two(np.int32(n))
