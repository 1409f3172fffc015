"""What a worker is told, derived from configuration and checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from pdserve.config.schema import Config, WorkerMode
from pdserve.core.errors import CheckpointError, ConfigError
from pdserve.launch.edge import model_info
from pdserve.launch.sizing import worker_mode, worker_spec
from pdserve.tiers.spec import TierSpec
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 shape; its KV takes some bytes per token, which the tests derive from its config.json."""
    return make_checkpoint(tmp_path_factory.mktemp("sizing"), "qwen3")


def config(checkpoint: Path, **settings: Any) -> Config:
    return Config.model_validate({"model": str(checkpoint), **settings}, strict=False)


def num_blocks(config: Config, device: str = "cpu") -> int:
    return worker_spec(config, "p", 1, device).num_blocks


def test_blocks_can_be_given_directly(checkpoint: Path) -> None:
    assert num_blocks(config(checkpoint, kv={"num_blocks": 200})) == 200


def test_memory_is_filled_with_whole_blocks_and_never_exceeded(checkpoint: Path) -> None:
    from pdserve.model.loader import load_model
    from pdserve.worker.worker import WorkerOptions, kv_layout

    memory = 3_000_000
    spec = worker_spec(config(checkpoint, kv={"memory": memory, "block_size": 8}), "p", 1, "cpu")
    loaded = load_model(checkpoint, dtype=spec.dtype, device=spec.device)
    layout = kv_layout(loaded, WorkerOptions(num_blocks=spec.num_blocks, block_size=spec.block_size))
    assert layout.total_bytes <= memory < layout.total_bytes + layout.block_bytes


def test_ranks_fill_each_its_own_memory_with_the_heads_it_holds(checkpoint: Path) -> None:
    """Two key heads: two ranks hold one each, four ranks one each twice over."""
    chosen = config(checkpoint, kv={"memory": "8MiB"})
    blocks = [worker_spec(chosen, "p", 1, "cpu", ranks).num_blocks for ranks in (1, 2, 4)]
    assert blocks[1] == blocks[2] == 2 * blocks[0]
    assert worker_spec(chosen, "p", 1, "cpu", 2).tensor_parallel == 2


def test_ranks_the_model_or_the_device_cannot_be_divided_among_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel 3: 4 attention heads do not divide by it"):
        worker_spec(config(checkpoint), "p", 1, "cpu", 3)
    with pytest.raises(ConfigError, match="tensor_parallel 2: several ranks compute together on cpu only"):
        worker_spec(config(checkpoint), "p", 1, "cuda", 2)


def test_half_the_bytes_per_value_hold_twice_the_blocks(checkpoint: Path) -> None:
    wide, narrow = (config(checkpoint, dtype=dtype, kv={"memory": "8MiB"}) for dtype in ("float32", "bfloat16"))
    assert num_blocks(narrow) == 2 * num_blocks(wide)


def test_without_a_size_a_gpu_gets_more_than_a_cpu(checkpoint: Path) -> None:
    plain = config(checkpoint, dtype="float32")
    assert num_blocks(plain, "cuda") == 32 * num_blocks(plain, "cpu")


def test_tiers_are_off_unless_they_are_given(checkpoint: Path) -> None:
    def tiers(**kv: Any) -> TierSpec | None:
        return worker_spec(config(checkpoint, kv=kv), "p", 1, "cpu").tiers

    assert tiers() is None
    assert tiers(tiers={"host": "1MiB"}) == TierSpec(host_bytes=2**20)
    both = {"host": "1MiB", "disk": {"path": "/kv", "size": "2MiB"}}
    assert tiers(tiers=both) == TierSpec(host_bytes=2**20, disk_path=Path("/kv"), disk_bytes=2**21)


def test_memory_too_small_for_one_request_is_refused_with_both_numbers(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv\.memory: 0 MiB holds \d+ tokens of this model, fewer than"):
        num_blocks(config(checkpoint, kv={"memory": 100_000}))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        num_blocks(config(tmp_path))


def test_the_spec_carries_the_configured_choices(checkpoint: Path) -> None:
    chosen = config(
        checkpoint,
        threads=3,
        deterministic=False,
        kv={"num_blocks": 300, "order": "layer_major", "backends": ["shared_memory"]},
    )
    spec = worker_spec(chosen, "decode-7", 99, "cpu")
    assert (spec.engine_id, spec.epoch, spec.threads, spec.deterministic) == ("decode-7", 99, 3, False)
    assert (spec.order, spec.backends) == ("layer_major", ("shared_memory",))
    assert worker_spec(config(checkpoint), "p", 1, "cpu").deterministic is None


def test_a_gpu_worker_gets_a_process_of_its_own_unless_told_otherwise() -> None:
    assert worker_mode(WorkerMode.AUTO, "cpu") is WorkerMode.INPROC
    assert worker_mode(WorkerMode.AUTO, "cuda") is WorkerMode.PROCESS
    assert worker_mode(WorkerMode.AUTO, "cpu", 2) is WorkerMode.PROCESS
    assert worker_mode(WorkerMode.INPROC, "cuda") is WorkerMode.INPROC
    assert worker_mode(WorkerMode.PROCESS, "cpu") is WorkerMode.PROCESS


def test_the_gateway_reads_the_same_model_facts_as_the_worker_without_loading_it(checkpoint: Path) -> None:
    from pdserve.model.loader import load_model

    loaded = load_model(checkpoint).info
    read = model_info(config(checkpoint, served_model_name="tiny", max_model_len=100))
    assert (read.revision, read.vocab_size, read.eos_token_ids) == (
        loaded.revision,
        loaded.vocab_size,
        loaded.eos_token_ids,
    )
    assert (read.name, read.max_model_len) == ("tiny", 100)
    assert model_info(config(checkpoint, max_model_len=10**6)).max_model_len == loaded.max_model_len
