"""Loading checkpoints: every layout of files, and every way a directory can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdserve.core.errors import CheckpointError, ConfigError
from pdserve.model.checkpoint import INDEX, SINGLE, model_revision
from pdserve.model.config import load_config
from pdserve.model.linear import PlainLinear, TiledLinear
from pdserve.model.loader import LoadedModel, load_model, resolve_device, resolve_dtype
from pdserve.model.packed_linear import PackedLinear, can_pack
from pdserve.model.weights import checkpoint_targets
from tests.checkpoints import EOS_TOKEN_IDS, VOCAB_SIZE, make_checkpoint

Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", "llama")


def edit_weights(path: Path, edit: Edit) -> None:
    tensors = load_file(path / SINGLE)
    edit(tensors)
    save_file(tensors, path / SINGLE)


def as_stored(path: Path) -> LoadedModel:
    """Loaded with weights that are not packed."""
    return load_model(path, deterministic=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_tensor_of_the_files_is_in_its_place(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, family)
    stored = load_file(path / SINGLE)
    targets = checkpoint_targets(as_stored(path).model)
    assert stored.keys() == targets.keys()
    assert all(torch.equal(targets[name].tensor, tensor) for name, tensor in stored.items())


def test_fused_parameters_leave_no_element_unfilled(tmp_path: Path) -> None:
    model = as_stored(make_checkpoint(tmp_path, "qwen2")).model
    covered = sum(target.tensor.numel() for target in checkpoint_targets(model).values())
    assert covered == sum(parameter.numel() for parameter in model.parameters())


def test_sharded_files_give_the_same_model(tmp_path: Path) -> None:
    single = as_stored(make_checkpoint(tmp_path / "single", "qwen3"))
    sharded = as_stored(make_checkpoint(tmp_path / "sharded", "qwen3", sharded=True))
    assert (tmp_path / "sharded" / INDEX).exists()
    pairs = zip(single.model.parameters(), sharded.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_tied_head_is_the_embedding_even_when_stored_twice(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tie=True)
    edit_weights(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(VOCAB_SIZE, 64)}))
    model = as_stored(path).model
    assert model.head
    assert model.head.weight.data_ptr() == model.embedding.data_ptr()
    assert model.embedding.any()


def test_info_tells_what_an_engine_needs(checkpoint: Path) -> None:
    info = load_model(checkpoint).info
    assert (info.name, info.vocab_size, info.max_model_len) == ("tiny", VOCAB_SIZE, 2048)
    assert info.eos_token_ids == EOS_TOKEN_IDS


def test_eos_comes_from_config_when_there_is_no_generation_config(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    assert load_model(checkpoint).info.eos_token_ids == EOS_TOKEN_IDS[:1]


def _remove(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(63)


def _quantize(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_remove, r"missing model\.layers\.1\.self_attn\.k_proj\.weight; unexpected none"),
        (_add, r"missing none; unexpected model\.layers\.0\.self_attn\.q_proj\.bias"),
        (_reshape, r"model\.norm\.weight has shape \[63\], config\.json asks \[64\]"),
        (_quantize, r"model\.norm\.weight is I8"),
    ],
)
def test_weights_that_do_not_fit_are_named(checkpoint: Path, edit: Edit, message: str) -> None:
    edit_weights(checkpoint, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", sharded=True)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        load_model(path)


def test_an_index_cannot_point_outside_its_directory(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(checkpoint)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_corrupt_file_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=SINGLE):
        load_model(checkpoint)


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    content = (checkpoint / SINGLE).read_bytes()
    (checkpoint / SINGLE).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(checkpoint)


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        load_model(tmp_path / "nowhere")


def test_cpu_computes_in_float32_unless_told(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    assert load_model(path).dtype == torch.float32
    told = load_model(path, dtype="bfloat16")
    assert {parameter.dtype for parameter in told.model.parameters()} == {torch.bfloat16}


def test_a_gpu_computes_in_the_checkpoints_dtype(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16))
    assert resolve_dtype("auto", config, torch.device("cuda")) == torch.bfloat16


def test_an_unknown_dtype_or_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported; use float32 or bfloat16"):
        load_model(checkpoint, dtype="int8")
    with pytest.raises(ConfigError, match="device 'meta' is not supported"):
        load_model(checkpoint, device="meta")
    with pytest.raises(ConfigError, match="device 'abacus' is unknown"):
        load_model(checkpoint, device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        resolve_device("cuda")


def test_deterministic_is_the_default_on_cpu(checkpoint: Path) -> None:
    expected = PackedLinear if can_pack(torch.float32) else TiledLinear
    for deterministic, method in ((None, expected), (False, PlainLinear)):
        head = load_model(checkpoint, deterministic=deterministic).model.head
        assert head
        assert isinstance(head.method, method)


class TestRevision:
    def test_it_is_the_same_for_the_same_files_elsewhere(self, tmp_path: Path) -> None:
        first, second = (model_revision(make_checkpoint(tmp_path / name, "llama")) for name in "ab")
        assert first == second
        assert len(first) == 16

    def test_other_weights_of_the_same_shapes_have_another(self, tmp_path: Path) -> None:
        first, second = (model_revision(make_checkpoint(tmp_path / str(seed), "llama", seed=seed)) for seed in range(2))
        assert first != second

    def test_another_config_has_another(self, checkpoint: Path) -> None:
        before = model_revision(checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
        assert model_revision(checkpoint) != before
