"""Causal attention of a step's tokens over paged KV: decode, chunked prefill after a cached prefix, and any mixture.

For query head h of the token at KV index p of its sequence, with g = h // (heads // kv_heads)::

    out = Σ_{i ≤ p} softmax_i(q · k[i, g] · scale) v[i, g]

A **unit** of work is a query tile (a few consecutive tokens of one sequence) under one KV head: the query heads that
share the KV head are rows of one matrix, so each key and value is read once for all of them. A unit's KV may be cut
into **parts**, which different programs compute. Part j leaves a partial state over its indices ::

    peak = max s      total = Σ 2**(s - peak)      acc = Σ 2**(s - peak) v      with s = q · k · scale · log2(e)

and the program that finishes the unit's last missing part folds the states together in the order of the parts.
The **work list** (work_list.py) says who computes what. It is built once per step and serves all layers.
"""
