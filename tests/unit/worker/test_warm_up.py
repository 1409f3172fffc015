"""The steps with which a worker warms up keep to what its model and memory hold."""

import pytest

from pdserve.worker.warm_up import prompt_steps


@pytest.mark.parametrize("room", [2, 3, 16, 17, 100, 257, 258, 4096])
@pytest.mark.parametrize("block_size", [1, 16])
def test_they_are_larger_than_asked_and_every_sequence_fits(room: int, block_size: int) -> None:
    prompts, mixed = prompt_steps(more_than=256, room=room, block_size=block_size)
    assert sum(row.num_tokens for row in prompts) > 256
    assert len({row.sequence_id for row in (*prompts, *mixed)}) == len(prompts) + 1
    assert mixed[0].sequence_id == prompts[0].sequence_id
    assert mixed[0].start == prompts[0].num_tokens
    for row in (*prompts, *mixed):
        end = row.start + row.num_tokens
        assert end <= room
        assert row.sequence_id < 0
        assert row.block_ids == (0,) * -(-end // block_size)
