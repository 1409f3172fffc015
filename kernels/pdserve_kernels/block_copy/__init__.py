"""Blocks of paged KV to and from one contiguous staging buffer, for transfers and tiers.

Staging holds the canonical order [block][layer][k|v][head][slot][dim] of the blocks asked for, whatever the memory's
own order is, and some heads of every layer if not all are wanted. Any copy is of bits: the dtype does not matter.

Per block of n bytes (of the heads asked for): operations none; bytes 2·n, each read and written once. On an H200
(4.3 TB/s, read and written) 1 GiB of blocks is 0.50 ms. Llama-3.1-8B's block of 16 tokens is 2 MiB: the launch is
hidden from about 8 blocks on.
"""
