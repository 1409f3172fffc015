"""Copies and xxh3 digests of scattered spans of bytes, many in one call that runs beside other threads of Python.

A digest is XXH3 with 128 bits, as xxHash's XXH3_128bits_withSeed computes it over one buffer, of spans one after
another. Its bulk is eight lanes of 64 bits that take 64 bytes at a time and are mixed after every BLOCK_BYTES. Only
spans of whole such blocks are taken here, so that none ends within one.

Memories are given by their addresses, in np.uint64: nothing is checked, and whoever calls keeps them alive. Offsets,
lengths and seeds are contiguous uint64. A digest runs as fast as memory is read. What is copied and digested goes
through the core's own cache piece by piece: the digest is of what the target holds, and costs a tenth of the copy.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pdserve_kernels.cpu.elements import compiled, inlined

BLOCK_BYTES = 1024

_PIECE_BYTES = np.uint64(64 << 10)
"""Copied, then digested: source and target together fit the second-level caches of all current processors."""

_STRIPE_BYTES, _SECRET_STEP = 64, 8
_STRIPES = BLOCK_BYTES // _STRIPE_BYTES
_MIXING_SECRET, _LAST_SECRET = 128, 121
_HIGH_SECRET, _LOW_SECRET = np.uint64(117), np.uint64(11)
"""Where in the secret's 192 bytes they begin."""

_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_LOW_FACTOR, _HIGH_FACTOR, _FINAL_FACTOR = np.uint64(_PRIME64_1), np.uint64(_PRIME64_2), np.uint64(0x165667919E3779F9)
_FIRST_LANES = np.array(
    [_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1], dtype=np.uint64
)
_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1c ded46de9839097db7240a4a4b7b3671f cb79e64eccc0e578825ad07dccff7221"
        "b8084674f743248ee03590e6813a264c 3c2852bb91c300cb88d0658b1b532ea3 71644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d 8a51e04bcdb45931c89f7ec9d9787364 eac5ac8334d3ebc3c581a0fffa1363eb"
        "170ddd51b7f0da49d316552629d4689e 2b16be587d47a1fc8ff8b8d17ad031ce 45cb3a8f95160428afd7fbcabb4b407e"
    ),
    dtype=np.uint64,
)

_I32, _I64, _I128 = ir.IntType(32), ir.IntType(64), ir.IntType(128)
_LANES = ir.VectorType(_I64, 8)
_NEIGHBOURS = ir.Constant(ir.VectorType(_I32, 8), [1, 0, 3, 2, 5, 4, 7, 6])

_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))
_CLOCK_MONOTONIC = np.int32(1)
_NANOSECONDS = np.int64(10**9)


@compiled
def all_fit(num_bytes: Any, offsets: Any, lengths: Any) -> Any:
    """Whether spans lie inside a memory of num_bytes; sums that overflow do not."""
    outside = 0
    for i in range(len(lengths)):
        outside += lengths[i] > num_bytes or offsets[i] > num_bytes - lengths[i]
    return outside == 0


@compiled
def all_whole(lengths: Any) -> Any:
    """Whether digest takes spans of these lengths."""
    others = 0
    for i in range(len(lengths)):
        others += lengths[i] == 0 or lengths[i] % np.uint64(BLOCK_BYTES) != 0
    return others == 0


@compiled
def copy(source: Any, target: Any, sources: Any, targets: Any, lengths: Any) -> Any:
    """lengths[i] bytes from source + sources[i] to target + targets[i]."""
    for i in range(len(lengths)):
        _memcpy(target + targets[i], source + sources[i], lengths[i])


@compiled
def digest(memory: Any, offsets: Any, lengths: Any, seeds: Any, digests: Any) -> Any:
    """digests (n, 2) uint64 get the high and the low half of each of n digests, of equally many spans in turn."""
    lanes, secret = np.empty(8, dtype=np.uint64), np.empty(24, dtype=np.uint64)
    for i in range(len(seeds)):
        first, end = _share(i, len(seeds), len(lengths))
        _begin(lanes, secret, seeds[i])
        for j in range(first, end):
            _absorb(lanes, secret, memory + offsets[j], lengths[j], j == end - 1)
        _finish(lanes, secret, lengths[first:end], digests[i])


@compiled
def copy_and_digest(
    source: Any, target: Any, sources: Any, targets: Any, lengths: Any, seeds: Any, digests: Any
) -> Any:
    """As copy, and as digest of what the target then holds. Returns the nanoseconds that digests took."""
    lanes, secret = np.empty(8, dtype=np.uint64), np.empty(24, dtype=np.uint64)
    clock, spent = np.empty(2, dtype=np.int64), np.int64(0)
    for i in range(len(seeds)):
        first, end = _share(i, len(seeds), len(lengths))
        _begin(lanes, secret, seeds[i])
        for j in range(first, end):
            done = np.uint64(0)
            while done < lengths[j]:
                length = min(lengths[j] - done, _PIECE_BYTES)
                _memcpy(target + targets[j] + done, source + sources[j] + done, length)
                spent -= _now(clock)
                last = j == end - 1 and done + length == lengths[j]
                _absorb(lanes, secret, target + targets[j] + done, length, last)
                spent += _now(clock)
                done += length
        _finish(lanes, secret, lengths[first:end], digests[i])
    return spent


@inlined
def _share(i: Any, parts: Any, total: Any) -> Any:
    each = total // parts
    return i * each, (i + 1) * each


@inlined
def _now(clock: Any) -> Any:
    _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    return clock[0] * _NANOSECONDS + clock[1]


@inlined
def _begin(lanes: Any, secret: Any, seed: Any) -> Any:
    for i in range(8):
        lanes[i] = _FIRST_LANES[i]
    for i in range(0, 24, 2):
        secret[i] = _SECRET[i] + seed
        secret[i + 1] = _SECRET[i + 1] - seed


@inlined
def _absorb(lanes: Any, secret: Any, address: Any, length: Any, last: Any) -> Any:
    blocks = length // np.uint64(BLOCK_BYTES) - np.uint64(last)
    _absorb_blocks(lanes.ctypes.data, secret.ctypes.data, address, blocks)
    if last:
        _absorb_last_block(lanes.ctypes.data, secret.ctypes.data, address + blocks * np.uint64(BLOCK_BYTES))


@inlined
def _finish(lanes: Any, secret: Any, lengths: Any, digest: Any) -> Any:
    num_bytes = np.uint64(0)
    for i in range(len(lengths)):
        num_bytes += lengths[i]
    digest[0] = _merged(lanes, secret.ctypes.data + _HIGH_SECRET, ~(num_bytes * _HIGH_FACTOR))
    digest[1] = _merged(lanes, secret.ctypes.data + _LOW_SECRET, num_bytes * _LOW_FACTOR)


@inlined
def _merged(lanes: Any, secret: Any, start: Any) -> Any:
    for i in range(0, 8, 2):
        at = secret + np.uint64(8 * i)
        start += _folded(lanes[i] ^ _word(at), lanes[i + 1] ^ _word(at + np.uint64(8)))
    start = (start ^ (start >> np.uint64(37))) * _FINAL_FACTOR
    return start ^ (start >> np.uint64(32))


@intrinsic
def _word(typing: Any, address: Any) -> Any:
    """The uint64 at an address of any alignment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()), align=1)

    return types.uint64(types.uintp), codegen


@intrinsic
def _folded(typing: Any, left: Any, right: Any) -> Any:
    """The two halves of a product of 128 bits, xored."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.mul(*(builder.zext(arg, _I128) for arg in args))
        return builder.xor(builder.trunc(product, _I64), builder.trunc(builder.lshr(product, _I128(64)), _I64))

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def _absorb_blocks(typing: Any, lanes: Any, secret: Any, address: Any, count: Any) -> Any:
    """Take count blocks that are not the last one. The lanes stay in registers meanwhile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes_at, secret_at, address_at, count_value = args
        before, start = builder.block, _vector(builder, lanes_at, 0)
        loop, after = builder.append_basic_block("blocks"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_unsigned("==", count_value, _I64(0)), after, loop)
        builder.position_at_end(loop)
        index, current = builder.phi(_I64), builder.phi(_LANES)
        block_at = builder.add(address_at, builder.mul(index, _I64(BLOCK_BYTES)))
        taken = _stripes(builder, current, secret_at, block_at, _STRIPES)
        mixed = builder.xor(taken, builder.lshr(taken, _all(47)))
        mixed = builder.mul(builder.xor(mixed, _vector(builder, secret_at, _MIXING_SECRET)), _all(_PRIME32_1))
        following = builder.add(index, _I64(1))
        for phi, first, later in ((index, _I64(0), following), (current, start, mixed)):
            phi.add_incoming(first, before)
            phi.add_incoming(later, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, count_value), loop, after)
        builder.position_at_end(after)
        result = builder.phi(_LANES)
        result.add_incoming(start, before)
        result.add_incoming(mixed, loop)
        _store(builder, lanes_at, result)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.uint64), codegen


@intrinsic
def _absorb_last_block(typing: Any, lanes: Any, secret: Any, address: Any) -> Any:
    """It is not mixed, and its last stripe has a secret of its own."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes_at, secret_at, address_at = args
        taken = _stripes(builder, _vector(builder, lanes_at, 0), secret_at, address_at, _STRIPES - 1)
        stripe = _vector(builder, address_at, BLOCK_BYTES - _STRIPE_BYTES)
        _store(builder, lanes_at, _with_stripe(builder, taken, stripe, _vector(builder, secret_at, _LAST_SECRET)))
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), codegen


def _stripes(builder: Any, lanes: Any, secret: Any, block: Any, count: int) -> Any:
    for number in range(count):
        stripe = _vector(builder, block, number * _STRIPE_BYTES)
        lanes = _with_stripe(builder, lanes, stripe, _vector(builder, secret, number * _SECRET_STEP))
    return lanes


def _with_stripe(builder: Any, lanes: Any, stripe: Any, secret: Any) -> Any:
    """Each lane plus its neighbour's word, plus the product of the halves of its own word under the secret."""
    keyed = builder.xor(stripe, secret)
    product = builder.mul(builder.and_(keyed, _all(0xFFFFFFFF)), builder.lshr(keyed, _all(32)))
    swapped = builder.shuffle_vector(stripe, ir.Constant(_LANES, ir.Undefined), _NEIGHBOURS)
    return builder.add(lanes, builder.add(product, swapped))


def _all(value: int) -> Any:
    return ir.Constant(_LANES, [value] * 8)


def _vector(builder: Any, address: Any, offset: int) -> Any:
    """The 64 bytes at an address of any alignment."""
    return builder.load(builder.inttoptr(builder.add(address, _I64(offset)), _LANES.as_pointer()), align=1)


def _store(builder: Any, address: Any, lanes: Any) -> None:
    builder.store(lanes, builder.inttoptr(address, _LANES.as_pointer()), align=1)
