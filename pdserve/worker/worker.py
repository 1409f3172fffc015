"""A worker put together: model, KV memory, attention, sampler, executor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch

from pdserve.attention.backends import make_attention
from pdserve.attention.base import AttentionBackend
from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.core.protocols import ModelInfo
from pdserve.core.shards import KVShard
from pdserve.model.loader import LoadedModel, load_model, resolve_deterministic
from pdserve.model.parallel import ParallelContext
from pdserve.worker.executor import InprocExecutor
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.numerics import numerics
from pdserve.worker.runner import BatchLayersDone, Runner
from pdserve.worker.warm_up import warm_up


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker runs its model.

    device "cpu", "cuda" or "cuda:N"; dtype "auto", "float32" or "bfloat16"; deterministic None means on CPU only.
    num_threads are torch's per operation. A step that takes longer than step_timeout seconds ends the worker.
    """

    num_blocks: int
    block_size: int = 16
    device: str = "cpu"
    dtype: str = "auto"
    order: KVOrder = KVOrder.BLOCK_MAJOR
    deterministic: bool | None = None
    num_threads: int = 1
    step_timeout: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The parts of a worker others use. Whoever built it closes it."""

    executor: InprocExecutor
    kv: KVTensors
    """The blocks of `layout`, as far as they are in `shard`."""
    layout: KVLayout
    """Of the engine, all ranks together."""
    shard: KVShard
    info: ModelInfo
    numerics: str
    """As in ModelInfo, promised or not."""

    def close(self) -> None:
        """End the computing thread; the KV memory lives as long as it is referred to."""
        self.executor.close()


def build_worker(
    path: Path,
    options: WorkerOptions,
    *,
    parallel: ParallelContext | None = None,
    allocate: Callable[[int], memoryview] | None = None,
    on_layers_done: BatchLayersDone | None = None,
) -> Worker:
    """Load a checkpoint, or a rank's part of it, and make it ready to run batches.

    parallel are the ranks that run them together; None is one alone. allocate is called with the KV memory's size
    in bytes and returns where it shall lie (CPU only); None lets torch allocate it. on_layers_done is called on the
    computing thread. Raises CheckpointError, ConfigError.
    """
    torch.set_num_threads(options.num_threads)  # packed products are tried as they will run
    loaded = load_model(
        path,
        dtype=options.dtype,
        device=options.device,
        deterministic=options.deterministic,
        parallel=parallel,
    )
    layout, shard = kv_layout(loaded, options), kv_shard(loaded)
    held = layout.of_heads(shard.heads)
    kv = KVTensors(held, device=loaded.device, buffer=allocate(held.total_bytes) if allocate else None)
    deterministic = resolve_deterministic(options.deterministic, loaded.device)
    attention = attention_backend(loaded, layout.block_size, deterministic)
    if loaded.device.type == "cpu":
        warm_up(loaded, attention, kv)
    executor = make_executor(loaded, attention, kv, options, on_layers_done)
    rounding = numerics(loaded.device, threads=options.num_threads, ranks=loaded.parallel.world_size)
    info = replace(loaded.info, numerics=rounding if deterministic else "")
    return Worker(executor=executor, kv=kv, layout=layout, shard=shard, info=info, numerics=rounding)


def make_executor(
    loaded: LoadedModel,
    attention: AttentionBackend,
    kv: KVTensors,
    options: WorkerOptions,
    on_layers_done: BatchLayersDone | None = None,
) -> InprocExecutor:
    """Steps on a GPU are recorded, and submitted ahead of it; with several ranks, heads too large for the attention
    kernel, or on a CPU they are computed one after the other."""
    limits: _Limits = {"num_threads": options.num_threads, "step_timeout": options.step_timeout}
    if loaded.kernels and loaded.parallel.world_size == 1:
        from pdserve.attention.triton_backend import TritonAttention
        from pdserve.worker.graph_runner import GraphRunner
        from pdserve.worker.overlapped import OverlappedExecutor

        if isinstance(attention, TritonAttention):
            runner = GraphRunner(loaded, attention, kv, on_layers_done)
            runner.warm_up()
            return OverlappedExecutor(runner, **limits)
    return InprocExecutor(Runner(loaded, attention, kv, on_layers_done), **limits)


class _Limits(TypedDict):
    num_threads: int
    step_timeout: float


def attention_backend(loaded: LoadedModel, block_size: int, deterministic: bool) -> AttentionBackend:
    """What attends for a rank's part of a model."""
    return make_attention(
        heads=loaded.shard.num_heads,
        kv_heads=loaded.shard.num_kv_heads,
        head_dim=loaded.config.head_dim,
        block_size=block_size,
        dtype=loaded.dtype,
        device=loaded.device,
        deterministic=deterministic,
    )


def kv_layout(loaded: LoadedModel, options: WorkerOptions) -> KVLayout:
    """The layout of an engine's KV memory: its model's shape in the options' blocks."""
    config = loaded.config
    group = KVGroup(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    return KVLayout(
        group=group,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        order=options.order,
        model_revision=loaded.info.revision,
    )


def kv_shard(loaded: LoadedModel) -> KVShard:
    """What a rank holds of every block."""
    return KVShard(rank=loaded.shard.rank, layers=(0, loaded.config.num_layers), heads=loaded.shard.kv_heads)
