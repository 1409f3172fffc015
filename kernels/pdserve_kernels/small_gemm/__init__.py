"""A linear layer for few rows, with what stands around it in a decoder layer: norm before, SiLU-mul or residual after.

    y = h · Wᵀ + bias        h = x, or weight · x / rms(x); W (columns, depth), as checkpoints store it
    y = silu(y₁) · y₂        where W holds gates and values, one above the other
    out = y, or residual + y

The norm needs no pass of its own: x times the norm's weight enters the products, the squares of x are summed on the
way, and the finished sums are divided by the root of their mean. A long depth is split among programs; the last to
arrive at a tile of the output adds up their parts, always in the same order. So the whole is one launch, and its bits
depend on the tiling alone: with the tiling that `deterministic` gives, a row's result is the same whatever other rows
there are.

For M rows, N columns, depth K, elements of b bytes: operations 2·M·N·K; bytes N·K·b of weights, M·(K + N)·b of rows.
While M is below about 184 in bf16 (790 TFLOP/s over 4.3 TB/s) the weights decide. One layer of Llama-3.1-8B on
an H200: qkv 50 MB 11.7 µs, output 34 MB 7.8 µs, gate-up 235 MB 54.6 µs, down 117 MB 27.3 µs, at any of these M.
"""
