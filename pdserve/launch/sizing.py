"""From the configuration to a worker: KV memory, and where it runs. Imports no torch."""

from pathlib import Path

from pdserve.config.schema import Config, TiersConfig, WorkerMode
from pdserve.core.errors import ConfigError
from pdserve.core.layout import DTYPE_BYTES, KVGroup
from pdserve.model.config import ModelConfig, load_config
from pdserve.model.sharding import shard_model
from pdserve.tiers.spec import TierSpec
from pdserve.worker.spec import WorkerSpec, check_ranks

_MIB = 2**20
_DEFAULT_MEMORY = {"cpu": 256 * _MIB, "cuda": 8192 * _MIB}


def worker_mode(mode: WorkerMode, device: str, tensor_parallel: int = 1) -> WorkerMode:
    """INPROC or PROCESS: a GPU's step loop never shares an interpreter with gRPC, nor do two ranks one with each
    other."""
    if mode is not WorkerMode.AUTO:
        return mode
    return WorkerMode.INPROC if device == "cpu" and tensor_parallel == 1 else WorkerMode.PROCESS


def worker_spec(config: Config, engine_id: str, epoch: int, device: str, tensor_parallel: int = 1) -> WorkerSpec:
    """Raises CheckpointError for a model that cannot be read, ConfigError for KV memory that is too small, or ranks
    the model or the device cannot be divided among."""
    model = load_config(config.model_path)
    check_ranks(tensor_parallel, device)
    kv_heads = shard_model(model, 0, tensor_parallel).num_kv_heads
    return WorkerSpec(
        model=config.model_path,
        engine_id=engine_id,
        epoch=epoch,
        num_blocks=num_blocks(config, model, device, kv_heads),
        block_size=config.kv.block_size,
        device=device,
        dtype=config.dtype,
        order=config.kv.order,
        deterministic=None if config.deterministic == "auto" else config.deterministic,
        threads=config.threads,
        backends=config.kv.backends,
        tensor_parallel=tensor_parallel,
        tiers=tier_spec(config.kv.tiers),
    )


def tier_spec(tiers: TiersConfig) -> TierSpec | None:
    """None when there are to be none."""
    if tiers.host is None:
        return None
    path = Path(tiers.disk.path) if tiers.disk.path is not None else None
    return TierSpec(host_bytes=int(tiers.host), disk_path=path, disk_bytes=int(tiers.disk.size or 0))


def max_model_len(config: Config, model: ModelConfig) -> int:
    """Prompt and answer together, in tokens."""
    return min(config.max_model_len, model.max_positions)


def num_blocks(config: Config, model: ModelConfig, device: str, kv_heads: int) -> int:
    """Blocks of the pool: as configured, or as many as fit into the configured or default memory of a rank, which
    holds kv_heads of every block."""
    if config.kv.num_blocks is not None:
        return config.kv.num_blocks
    memory = config.kv.memory or _DEFAULT_MEMORY[device]
    block_size, longest = config.kv.block_size, max_model_len(config, model)
    blocks = int(memory) // (kv_group(config, model, device, kv_heads).slot_bytes * block_size)
    if blocks * block_size < longest:
        raise ConfigError(
            f"kv.memory: {memory / _MIB:.0f} MiB holds {blocks * block_size} tokens of this model, fewer than "
            f"max_model_len {longest}; raise kv.memory or lower max_model_len"
        )
    return blocks


def kv_group(config: Config, model: ModelConfig, device: str, kv_heads: int) -> KVGroup:
    """One token's KV with so many heads. dtype auto as the model loader decides it: float32 on cpu, else the
    checkpoint's."""
    automatic = "float32" if device == "cpu" else model.dtype
    dtype = automatic if config.dtype == "auto" else config.dtype
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype: the checkpoint's {dtype} is not supported; set dtype to float32 or bfloat16")
    return KVGroup(num_layers=model.num_layers, num_kv_heads=kv_heads, head_dim=model.head_dim, dtype=dtype)
