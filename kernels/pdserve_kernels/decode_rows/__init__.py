"""The table of decoding sequences on the device: a step's inputs out of it, and its results back into it.

A row of the table (int64) is a sequence::

    0 POSITION      of the next input token
    1 TOKEN         that token
    2 STREAM        noise stream of its draws
    3 TOP_K
    4 TEMPERATURE, 5 TOP_P, 6 MIN_P     bits of float32 numbers
    8 …             block table: entry i is the block of positions [i · block_size, (i + 1) · block_size)

A step names the rows it computes, -1 for padding. Operations: a dozen per row; bytes: about 200 per row. Both launches
are bound by their latency, 2–3 µs in a graph on an H200; in tensor operations they would be some twenty launches.
"""
