"""Into which regions, the units of digest and transfer, a ticket's blocks fall."""

MAX_REGION_BLOCKS = 256
FIRST_REGION_BYTES = 4 << 20
LAST_REGION_BYTES = 16 << 20
REGION_BYTES = 64 << 20
"""Of what becomes final together, a region is as large as all before it, from the first of these to the last, and one
block at least: small at first, so that little waits for its digest, then so large that its messages and the Python it
costs take less time than moving it. Towards the end it is half of what is left, and no less than the second: little is
left to verify when the last one has arrived."""


def next_region(block_bytes: int, num_published: int, num_left: int) -> int:
    """Blocks of the next region, when of those that became final together so many are published and so many not."""
    sizes = (FIRST_REGION_BYTES, LAST_REGION_BYTES, REGION_BYTES)
    first, last, largest = (_blocks_of(size, block_bytes) for size in sizes)
    size = min(num_published, largest, max(last, num_left // 2))
    return min(num_left, max(first, size))


def num_regions(block_bytes: int, num_blocks: int) -> int:
    """Into how many regions blocks fall that become final together."""
    regions, published = 0, 0
    while published < num_blocks:
        published += next_region(block_bytes, published, num_blocks - published)
        regions += 1
    return regions


def _blocks_of(region_bytes: int, block_bytes: int) -> int:
    return max(1, min(MAX_REGION_BLOCKS, region_bytes // block_bytes))
