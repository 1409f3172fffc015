"""Tokens chosen from logits: penalties, filters and a draw by keyed noise, without a sort and without probabilities.

A row's scores are its logits after, in this order: repetition penalty (seen tokens), frequency and presence penalties
(tokens of the output), bans, the mask of allowed tokens, temperature. Of equal scores the first token wins.
With temperature 0 the best score is the answer. Otherwise it is the kept token with the largest

    score + noise(key, token)       noise(key, token) = -log(-log(u)),  u = (bits + 1/2) / 2**52,
                                    bits = mix(key + (token + 1) * STEP) >> 12

which is a draw from the softmax of the kept scores (Gumbel-max). mix is the finalizer of SplitMix64, and
key = mix(mix(stream + position + STEP) + STEP) with a stream from the request's seed and sample index: a draw
depends on nothing else, and integers make the same bits on every processor.

What is kept is decided for single tokens. With t the best of a set that holds all kept tokens, t is the answer
if it is kept itself, and otherwise no token that ranks at or below t is kept: the search goes on above it. So top-p
needs for each t one sum over the row, of the mass above t, and about 1/p sums in all; no order is ever
established. (The filter order is top-k, then top-p of what is left, then min-p; a token's mass includes that
of equal ones before it, as an ascending stable sort would have it.)

History is one number per row and token, 2 · (times in the output) + (in the prompt); choosing a token adds 2 to its
own.

Per row of V tokens: operations about 60·V, of them two logarithms in float64 per token of a tile that could hold the
winner; bytes 4·V of float32 logits, and 4·V of history where there are penalties. At V = 128,256 an H200
(4.3 TB/s) reads 0.5 MB in 0.1 µs a row: one row is two launches (5 µs), 256 rows 31 µs. Rows with top-k add four
counts, with top-p about two sums over logits in L2, some 6 µs each, all rows in parallel up to one per
multiprocessor.
"""
