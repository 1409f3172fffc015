"""Gather and scatter of KV blocks: the interpreted kernels move the reference's bits, and no others."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve_kernels.block_copy import kernel, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def memory(*, heads: int, block_size: int, dim: int, dtype: str, order: KVOrder, seed: int = 0) -> Tensor:
    """Random bits as (num_blocks, layers, 2, kv_heads, block_size, head_dim), in the order's strides."""
    group = KVGroup(num_layers=2, num_kv_heads=heads, head_dim=dim, dtype=dtype)
    layout = KVLayout(group=group, block_size=block_size, num_blocks=5, order=order)
    bits = np.random.default_rng(seed).integers(0, 256, layout.total_bytes, dtype=np.uint8)
    shape = (5, 2, 2, heads, block_size, dim)
    return torch.from_numpy(bits).view(getattr(torch, dtype)).as_strided(shape, layout.strides)


def as_bits(kv: Tensor) -> np.ndarray:
    """NaN compares unequal to itself; the integer it is made of does not."""
    return kv.view(torch.int32 if kv.element_size() == 4 else torch.int16).numpy()


@pytest.mark.parametrize("order", KVOrder)
@pytest.mark.parametrize(
    ("heads", "chosen", "block_size", "dim", "dtype"),
    [(4, (0, 4), 16, 64, "bfloat16"), (3, (1, 3), 16, 33, "bfloat16"), (2, (1, 2), 3, 5, "float32")],
    ids=["whole blocks", "odd heads", "narrow words"],
)
def test_blocks_survive_the_way_there_and_back(
    heads: int, chosen: tuple[int, int], block_size: int, dim: int, dtype: str, order: KVOrder
) -> None:
    kv = memory(heads=heads, block_size=block_size, dim=dim, dtype=dtype, order=order)
    blocks = torch.tensor([4, 0, 3])
    staging = kernel.gather_blocks(kv, blocks, chosen)
    assert np.array_equal(as_bits(staging), reference.gather_blocks(as_bits(kv), blocks.numpy(), chosen))

    target = memory(heads=heads, block_size=block_size, dim=dim, dtype=dtype, order=order, seed=1)
    expected = as_bits(target).copy()
    reference.scatter_blocks(as_bits(staging), expected, np.array([1, 2, 4]), chosen)
    kernel.scatter_blocks(staging, target, torch.tensor([1, 2, 4]), chosen)
    assert np.array_equal(as_bits(target), expected)


@pytest.mark.parametrize(("places", "width"), [((64, 1024), 8), ((64, 1028), 4), ((2, 1024), 2), ((64, 33), 1)])
def test_words_are_as_wide_as_every_place_allows(places: tuple[int, ...], width: int) -> None:
    assert kernel.word_bytes(places) == width


def test_no_blocks_are_no_work_and_what_does_not_fit_is_refused() -> None:
    kv = memory(heads=2, block_size=4, dim=8, dtype="float32", order=KVOrder.BLOCK_MAJOR)
    none = torch.zeros(0, dtype=torch.int64)
    assert kernel.gather_blocks(kv, none, (0, 2)).shape == (0, 2, 2, 2, 4, 8)
    with pytest.raises(ValueError, match="not among the 2"):
        kernel.gather_blocks(kv, none, (1, 3))
    with pytest.raises(ValueError, match="lie together"):
        kernel.gather_blocks(kv.transpose(3, 4), none, (0, 2))
    with pytest.raises(ValueError, match="not 1 blocks"):
        kernel.scatter_blocks(torch.zeros(2, 2, 2, 2, 4, 8), kv, torch.tensor([0]), (0, 2))
