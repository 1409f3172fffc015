"""A model divided among ranks: every head and column somewhere, query heads beside the key heads they need."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pdserve.core.errors import ConfigError
from pdserve.model.checkpoint import SINGLE
from pdserve.model.config import ModelConfig, load_config
from pdserve.model.loader import load_model
from pdserve.model.parallel import SingleRank
from pdserve.model.sharding import shard_model
from pdserve.model.weights import checkpoint_targets
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(make_checkpoint(tmp_path_factory.mktemp("model"), "llama"))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_ranks_hold_equal_parts_and_the_key_heads_their_heads_attend_to(
    config: ModelConfig, kv_heads: int, group: int, world_size: int, columns: int
) -> None:
    heads = kv_heads * group
    shape = replace(config, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=columns * world_size)
    if heads % world_size or (kv_heads % world_size and world_size % kv_heads):
        with pytest.raises(ConfigError, match=f"tensor_parallel {world_size}"):
            shard_model(shape, 0, world_size)
        return
    shards = [shard_model(shape, rank, world_size) for rank in range(world_size)]
    for part in ("heads", "intermediate"):
        ranges = [getattr(shard, part) for shard in shards]
        assert all(one[1] == two[0] for one, two in pairwise(ranges))
        assert (ranges[0][0], ranges[-1][1]) == (0, heads if part == "heads" else columns * world_size)
        assert len({end - first for first, end in ranges}) == 1
    for shard in shards:
        needed = {head // group for head in range(*shard.heads)}
        assert needed == set(range(*shard.kv_heads))


def test_a_model_that_does_not_divide_is_refused_with_the_sizes_it_can_take(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"4 attention heads do not divide by it; this model can take 1, 2, 4"):
        shard_model(config, 0, 3)
    with pytest.raises(ConfigError, match=r"3 key-value heads neither divide by it nor divide it"):
        shard_model(replace(config, num_heads=6, num_kv_heads=3), 0, 2)
    with pytest.raises(ConfigError, match=r"intermediate_size 97 does not divide by it; this model can take 1$"):
        shard_model(replace(config, intermediate_size=97), 0, 2)


class Rank(SingleRank):
    """A rank that never computes."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_ranks_parts_of_each_tensor_make_the_whole(kv_heads: int, tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path, "llama", num_key_value_heads=kv_heads, attention_bias=True, mlp_bias=True, num_hidden_layers=1
    )
    stored = load_file(path / SINGLE)
    rebuilt = {name: torch.full_like(tensor, float("nan")) for name, tensor in stored.items()}
    for rank in range(4):
        model = load_model(path, deterministic=False, parallel=Rank(rank, 4)).model
        for name, target in checkpoint_targets(model).items():
            place = rebuilt[name]
            if target.part is not None:
                dimension, first, end = target.part
                place = place.narrow(dimension, first, end - first)
                assert end - first < stored[name].shape[dimension]
            place.copy_(target.tensor)
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in stored.items())
