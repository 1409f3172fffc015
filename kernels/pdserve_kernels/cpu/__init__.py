"""Kernels for one CPU core, compiled by Numba for the processor they run on; compiled code is cached on disk.

Every result of a row is computed from that row alone, in an order that follows from its own length: the same bits in
any batch and chunking. Arrays are C-contiguous; float32, or int16 that holds the bits of bfloat16 values.

Per token that sees n tokens of KV, with H query and G key-value heads of D elements of b bytes, attention needs 4·H·D·n
operations and reads 2·G·D·b·n bytes where they lie. At 26 GB/s and 100 GFLOP/s of a core the bytes decide as long as
H/G is below 2·b. Products (product.py) have figures of their own; the others do a few operations per element and read
each once.
"""
