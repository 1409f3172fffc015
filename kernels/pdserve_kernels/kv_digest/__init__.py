"""The keyed sum: a 128-bit digest of scattered spans of bytes that any number of threads can compute in any order.

The bytes are 64-bit little-endian words w[0], w[1], … in the order of the spans. Arithmetic is modulo 2**64::

    mix(x)      the finalizer of SplitMix64, a bijection
    key[lane]   mix(seed + (lane + 1) * STEP)                     for lanes 0 and 1
    sum[lane]   sum over i of mix(w[i] ^ (key[lane] + i * STEP))
    digest      mix(sum[lane] ^ number of bytes), both lanes, little-endian

Each word enters under a key of its own place. So one damaged word always changes both sums, and any other damage
(words swapped, dropped or of another seed) goes unseen with the chance of 128 random bits. Sums of integers
do not depend on order, so neither do the bytes of the digest. It detects accidents; it does not authenticate.
"""
