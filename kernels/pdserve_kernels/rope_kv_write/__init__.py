"""From a projection's output to attention's input in one pass: query/key norm, rotary embedding, KV write.

Of each token's [queries | keys | values], queries and keys are normed per head (where the model does so), turned
by the token's position in the half-split form, and rounded; queries go to a tensor of their own, keys and
values to the token's slot in paged memory. Cosines and sines come from the caller's table, whatever scaling (Llama 3's)
made them.

Per token with H query and G key-value heads of D elements of b bytes: operations about 10·(H + G)·D; bytes
2·(H + 2·G)·D·b (everything read once and written once) and 4·D of table. Llama-3.1-8B (H 32, G 8, D 128, bf16) moves
25 KB a token: on an H200 (4.3 TB/s) 1.5 µs for 256 tokens, so the launch (2–3 µs) is what decode pays, and 48 µs for
8,192.
"""
