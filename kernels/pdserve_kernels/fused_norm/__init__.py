"""Residual add and RMSNorm in one pass over the residual stream.

    x ← x + delta                          in x's dtype, where there is a delta
    normed = weight · (x / rms(x))         the mean in float32, x / rms(x) rounded to x's dtype as checkpoints expect

Per row of d elements of b bytes: operations 6·d; bytes 4·d·b (x and delta read, x and normed written) and the weight.
At d = 4096 in bf16 an H200 (4.3 TB/s) needs 2.0 µs for 256 rows, and 31 µs for 4,096; below about 256 rows the launch
itself (2–3 µs) is what it costs.
"""
