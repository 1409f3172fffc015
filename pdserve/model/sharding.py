"""Which part of a model each rank of an engine holds. Pure, and free of torch: launching checks it, too."""

from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.model.config import ModelConfig

Range = tuple[int, int]
"""Half-open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's heads and MLP columns. kv_heads are those its heads attend to: with fewer key heads than ranks,
    neighbouring ranks hold the same one."""

    rank: int
    world_size: int
    heads: Range
    kv_heads: Range
    intermediate: Range

    @property
    def num_heads(self) -> int:
        return self.heads[1] - self.heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def num_columns(self) -> int:
        """Columns of the MLP's inner layer."""
        return self.intermediate[1] - self.intermediate[0]


def shard_model(config: ModelConfig, rank: int, world_size: int) -> Shard:
    """Rank's share of a model. Raises ConfigError when the model does not divide into world_size equal ones."""
    reason = _obstacle(config, world_size)
    if reason:
        sizes = [str(size) for size in range(1, config.num_heads + 1) if not _obstacle(config, size)]
        raise ConfigError(f"tensor_parallel {world_size}: {reason}; this model can take {', '.join(sizes)}")
    return Shard(
        rank=rank,
        world_size=world_size,
        heads=_share(config.num_heads, rank, world_size),
        kv_heads=_share(config.num_kv_heads, rank, world_size),
        intermediate=_share(config.intermediate_size, rank, world_size),
    )


def _obstacle(config: ModelConfig, world_size: int) -> str:
    """Why the model does not divide; empty when it does."""
    kv_heads = config.num_kv_heads
    if config.num_heads % world_size:
        return f"{config.num_heads} attention heads do not divide by it"
    if kv_heads % world_size and world_size % kv_heads:
        return f"{kv_heads} key-value heads neither divide by it nor divide it"
    if config.intermediate_size % world_size:
        return f"intermediate_size {config.intermediate_size} does not divide by it"
    return ""


def _share(total: int, rank: int, world_size: int) -> Range:
    """An equal part of total; when there are fewer than ranks, one each, the same one for neighbours."""
    size = max(1, total // world_size)
    first = rank * total // world_size
    return first, first + size
