"""Prompts made from a trace: equal blocks exactly where hash ids are equal."""

import pytest

from pdserve.core.blocks import block_hashes, hash_namespace
from pdserve.simulator.workload import from_trace, prompt_tokens
from pdserve_loadgen.traces import TraceEntry

BLOCK = 512
NAMESPACE = hash_namespace(b"", "model")


def entry(tokens: int, *hash_ids: int) -> TraceEntry:
    return TraceEntry(at=0.0, input_tokens=tokens, output_tokens=1, hash_ids=hash_ids)


def shared_blocks(one: TraceEntry, other: TraceEntry, block_size: int = BLOCK) -> int:
    hashes = [block_hashes(prompt_tokens(e, 2**30 + n), block_size, NAMESPACE) for n, e in enumerate((one, other))]
    return sum(a == b for a, b in zip(*hashes, strict=False))


@pytest.mark.parametrize("block_size", [16, 64, BLOCK])
def test_prompts_share_the_leading_blocks_the_trace_says(block_size: int) -> None:
    one, other = entry(4 * BLOCK, 7, 8, 9, 10), entry(4 * BLOCK, 7, 8, 90, 10)
    assert shared_blocks(one, other, block_size) == 2 * BLOCK // block_size


def test_an_equal_block_behind_a_different_one_is_not_shared() -> None:
    assert shared_blocks(entry(2 * BLOCK, 1, 3), entry(2 * BLOCK, 2, 3)) == 0


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_prompts_have_the_trace_s_length_whatever_its_hash_ids_cover(tokens: int) -> None:
    assert len(prompt_tokens(entry(tokens, 1, 2), 2**30)) == tokens


def test_what_no_hash_id_covers_is_shared_with_nobody() -> None:
    assert shared_blocks(entry(4 * BLOCK), entry(4 * BLOCK)) == 0


def test_a_hash_id_that_cannot_be_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="hash id"):
        prompt_tokens(entry(10, 2**31), 0)


def test_requests_carry_the_trace_s_times_and_lengths_and_seeds_of_their_own() -> None:
    entries = [TraceEntry(at=number / 2, input_tokens=9, output_tokens=number + 1) for number in range(5)]
    arrivals = list(from_trace(entries, seed=1))
    assert [arrival.at for arrival in arrivals] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [arrival.request.sampling.max_tokens for arrival in arrivals] == [1, 2, 3, 4, 5]
    assert len({arrival.request.sampling.seed for arrival in arrivals}) == 5
    assert arrivals == list(from_trace(entries, seed=1)) != list(from_trace(entries, seed=2))
