"""Rotary embedding against transformers' own tables."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pdserve.model.config import load_config
from pdserve.model.rope import Rotary, rotate
from tests.checkpoints import LLAMA3_ROPE, make_checkpoint


@pytest.mark.parametrize("overrides", [{}, {"rope_parameters": LLAMA3_ROPE}], ids=["plain", "llama3"])
def test_rotation_equals_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", **overrides)
    rotary, reference = Rotary(load_config(tmp_path)), LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.tensor([0, 1, 17, 500, 2047])
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = reference(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(rotate(x, rotary.at(positions)), expected[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "plain", "llama")
    make_checkpoint(tmp_path / "scaled", "llama", rope_parameters=LLAMA3_ROPE)
    plain, scaled = (Rotary(load_config(tmp_path / name)).sin[1].asin() for name in ("plain", "scaled"))
    ratio = plain / scaled
    torch.testing.assert_close(ratio[:1], torch.ones(1))
    torch.testing.assert_close(ratio[-1:], torch.full((1,), 8.0))
    assert (ratio.diff() >= -1e-4).all()
