"""Norm, rotary embedding and KV write: the interpreted kernel against float64, in both orders of KV memory."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.worker.kv_tensors import KVTensors
from pdserve_kernels.rope_kv_write import kernel, reference
from tests.kernels.arrays import Draws, assert_close, wide

pytestmark = pytest.mark.usefixtures("poisoned")
LAYERS, POSITIONS = 3, 50
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    tokens: int = 7
    heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    order: KVOrder = KVOrder.BLOCK_MAJOR
    norm: bool = True


def memory(shape: Shape, num_blocks: int) -> KVTensors:
    group = KVGroup(num_layers=LAYERS, num_kv_heads=shape.kv_heads, head_dim=shape.dim, dtype=NAMES[shape.dtype])
    layout = KVLayout(group=group, block_size=shape.block_size, num_blocks=num_blocks, order=shape.order)
    kv = KVTensors(layout, device=torch.device("cpu"))
    for layer in kv.layers:
        layer.fill_(float("nan"))
    return kv


def slots_of(shape: Shape, num_blocks: int) -> Tensor:
    """Scattered places, all different; every fifth token is padding."""
    places = torch.randperm(num_blocks * shape.block_size, generator=torch.Generator().manual_seed(3))
    slots = places[: shape.tokens].clone()
    slots[4::5] = -1
    return slots


def check(shape: Shape) -> None:
    draws, num_blocks = Draws(shape.dim, shape.dtype), -(-shape.tokens // shape.block_size) + 2
    qkv = draws.normal(shape.tokens, shape.heads + 2 * shape.kv_heads, shape.dim)
    table = tuple(draws.normal(POSITIONS, shape.dim // 2, dtype=torch.float32) for _ in range(2))
    positions = torch.randint(POSITIONS, (shape.tokens,), generator=torch.Generator().manual_seed(1))
    slots, weights = slots_of(shape, num_blocks), (draws.normal(shape.dim), draws.normal(shape.dim))
    norms = kernel.HeadNorms(query=weights[0], key=weights[1], eps=1e-6) if shape.norm else None
    exact = reference.HeadNorms(query=wide(weights[0]), key=wide(weights[1]), eps=1e-6) if shape.norm else None
    kv = memory(shape, num_blocks)
    expected_kv = wide(kv.layers[1]).copy()
    cos, sin = (wide(part) for part in table)
    expected = reference.rope_kv_write(wide(qkv), positions.numpy(), slots.numpy(), (cos, sin), expected_kv, exact)
    q = kernel.rope_kv_write(qkv, positions, slots, (table[0], table[1]), kv.layers[1], norms)
    assert_close(q, expected, places=6)
    written = ~np.isnan(expected_kv)
    assert np.array_equal(~np.isnan(wide(kv.layers[1])), written), "exactly the tokens' slots are written"
    assert_close(kv.layers[1][torch.from_numpy(written)], expected_kv[written], places=6)
    assert kv.layers[0].isnan().all()
    assert kv.layers[2].isnan().all()


@pytest.mark.parametrize("order", KVOrder)
@pytest.mark.parametrize("norm", [True, False])
def test_it_equals_the_reference_in_every_order(order: KVOrder, norm: bool) -> None:
    check(Shape(order=order, norm=norm))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_it_equals_the_reference_for_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    check(Shape(dim=dim, dtype=dtype, tokens=3, heads=5, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_it_equals_the_reference_for_every_group_and_block_size(dim: int, block_size: int, group: int) -> None:
    order = KVOrder.LAYER_MAJOR if group == 3 else KVOrder.BLOCK_MAJOR
    check(Shape(dim=dim, block_size=block_size, heads=2 * group, order=order, tokens=9))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 16, 257])
def test_it_equals_the_reference_for_any_number_of_tokens(tokens: int) -> None:
    check(Shape(tokens=tokens, heads=2, kv_heads=1, norm=tokens % 2 == 0))


def test_what_does_not_fit_is_refused() -> None:
    kv = memory(Shape(), 2).layers[0]
    table, places = (torch.zeros(4, 32), torch.zeros(4, 32)), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="as long as those of kv"):
        kernel.rope_kv_write(torch.zeros(1, 10, 32), places, places, table, kv, None)
    with pytest.raises(ValueError, match="kv holds"):
        kernel.rope_kv_write(torch.zeros(1, 10, 64).half(), places, places, table, kv, None)
