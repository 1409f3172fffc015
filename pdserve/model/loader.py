"""From a checkpoint directory to a model ready to run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.attention.arrays import Scratch, have_cpu_kernels
from pdserve.core.errors import CheckpointError, ConfigError
from pdserve.core.protocols import ModelInfo
from pdserve.model.checkpoint import eos_token_ids, model_revision, weight_files
from pdserve.model.config import ModelConfig, load_config
from pdserve.model.decoder import Decoder
from pdserve.model.layers import Build
from pdserve.model.linear import Linear, LinearMethod, PlainLinear, TiledLinear
from pdserve.model.ops import LayerOps, TorchOps
from pdserve.model.packed_linear import PackedLinear, can_pack
from pdserve.model.parallel import ParallelContext, SingleRank
from pdserve.model.sharding import Shard, shard_model
from pdserve.model.weights import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """One rank's part of a model, how it was read, and what the torch-free part of an engine must know of it."""

    model: Decoder
    config: ModelConfig
    shard: Shard
    parallel: ParallelContext
    info: ModelInfo
    dtype: torch.dtype
    device: torch.device
    kernels: bool
    """Whether it computes in Triton kernels."""


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    deterministic: bool | None = None,
    parallel: ParallelContext | None = None,
    kernels: bool | None = None,
) -> LoadedModel:
    """Load a Hugging Face checkpoint directory, or a rank's part of it.

    dtype "auto" is float32 on CPU and the checkpoint's own elsewhere. deterministic makes results independent of
    the batch; None means on CPU only. kernels chooses Triton kernels over torch's operations; None means on GPUs.
    parallel are the ranks that compute the model together; None is one alone. Raises CheckpointError for a directory
    that cannot be served and ConfigError for a dtype, device or number of ranks that cannot be used.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give a checkpoint directory in Hugging Face layout")
    config = load_config(path)
    place = resolve_device(device)
    ranks = parallel or SingleRank()
    in_kernels = place.type == "cuda" if kernels is None else kernels
    chosen_dtype = resolve_dtype(dtype, config, place)
    method, ops = _arithmetic(place, chosen_dtype, in_kernels, resolve_deterministic(deterministic, place))
    build = Build(
        config=config,
        method=method,
        ops=ops,
        parallel=ranks,
        shard=shard_model(config, ranks.rank, ranks.world_size),
        dtype=chosen_dtype,
        device=place,
    )
    files = weight_files(path)
    model = Decoder(build)
    load_weights(model, files)
    if isinstance(method, PackedLinear):
        method.pack(module for module in model.modules() if isinstance(module, Linear))
    info = ModelInfo(
        name=path.resolve().name,
        revision=model_revision(path),
        vocab_size=config.vocab_size,
        max_model_len=config.max_positions,
        eos_token_ids=eos_token_ids(path, config),
    )
    return LoadedModel(
        model=model.eval(),
        config=config,
        shard=build.shard,
        parallel=ranks,
        info=info,
        dtype=build.dtype,
        device=place,
        kernels=in_kernels,
    )


def _arithmetic(
    device: torch.device, dtype: torch.dtype, kernels: bool, deterministic: bool
) -> tuple[LinearMethod, LayerOps]:
    if kernels:
        from pdserve.model.kernel_ops import KernelLinear, KernelOps
        from pdserve_kernels.small_gemm.kernel import Workspace

        kernel = KernelLinear(Workspace.on(device), deterministic=deterministic)
        return kernel, KernelOps(kernel)
    scratch = Scratch()
    method = _linear_method(device, dtype, deterministic, scratch)
    if device.type != "cpu" or not have_cpu_kernels():
        return method, TorchOps()
    from pdserve.model.cpu_ops import CpuOps

    return method, CpuOps(scratch)


def _linear_method(device: torch.device, dtype: torch.dtype, deterministic: bool, scratch: Scratch) -> LinearMethod:
    if not deterministic:
        return PlainLinear()
    return PackedLinear(scratch) if device.type == "cpu" and can_pack(dtype) else TiledLinear()


def resolve_device(device: str) -> torch.device:
    """The torch device of a name such as "cpu" or "cuda:0", if this machine has it."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; use cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device; use cpu")
    return place


def resolve_deterministic(deterministic: bool | None, device: torch.device) -> bool:
    """The default is on for CPU, where it costs little, and off elsewhere."""
    return device.type == "cpu" if deterministic is None else deterministic


def resolve_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype weights, activations and KV will have."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else config.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}")
    return DTYPES[dtype]
