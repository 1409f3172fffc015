"""KV memory: every element where the layout says, in memory of our choosing, zeroed."""

import mmap

import pytest
import torch

from pdserve.core.errors import ConfigError
from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.worker.kv_tensors import KVTensors

CPU = torch.device("cpu")


def layout(order: KVOrder, dtype: str = "float32") -> KVLayout:
    group = KVGroup(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)
    return KVLayout(group=group, block_size=4, num_blocks=5, order=order)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", list(KVOrder))
def test_views_lie_where_the_layouts_strides_say(order: KVOrder, dtype: str) -> None:
    kv = KVTensors(layout(order, dtype), device=CPU)
    elements = kv.memory.view(kv.layers[0].dtype)
    elements.copy_(torch.arange(elements.numel()) % 251)
    for place in [(0, 0, 0, 0, 0, 0), (4, 2, 1, 1, 3, 7), (2, 1, 0, 1, 2, 5)]:
        block, layer, *inner = place
        offset = sum(i * stride for i, stride in zip(place, kv.layout.strides, strict=True))
        assert kv.layers[layer][block, *inner] == offset % 251


@pytest.mark.parametrize("order", list(KVOrder))
def test_the_views_of_a_block_are_exactly_its_byte_spans(order: KVOrder) -> None:
    kv = KVTensors(layout(order), device=CPU)
    for layer in kv.layers:
        layer[3] = 1.0
    written = torch.zeros_like(kv.memory, dtype=torch.bool)
    for offset, length in kv.layout.spans(3):
        written[offset : offset + length] = True
    assert torch.equal((kv.memory.view(torch.float32) == 1).repeat_interleave(4), written)


def test_a_buffer_is_used_in_place_and_zeroed() -> None:
    shape = layout(KVOrder.BLOCK_MAJOR)
    mapping = mmap.mmap(-1, shape.total_bytes + 64)
    mapping[:] = b"\xff" * len(mapping)
    kv = KVTensors(shape, device=CPU, buffer=memoryview(mapping))
    assert not any(mapping[: shape.total_bytes])
    assert mapping[shape.total_bytes :] == b"\xff" * 64
    kv.layers[0][0, 0, 0, 0, 0] = 1.0
    assert mapping[:4] == b"\x00\x00\x80\x3f"


def test_an_allocation_is_zeroed() -> None:
    assert not KVTensors(layout(KVOrder.LAYER_MAJOR), device=CPU).memory.any()


@pytest.mark.parametrize("buffer", [bytes(10**5), bytearray(100)], ids=["readonly", "small"])
def test_an_unfit_buffer_is_refused(buffer: bytes | bytearray) -> None:
    with pytest.raises(ConfigError, match="must be writable and hold 7680 bytes"):
        KVTensors(layout(KVOrder.BLOCK_MAJOR), device=CPU, buffer=memoryview(buffer))


def test_a_host_buffer_is_refused_for_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs device cpu"):
        KVTensors(layout(KVOrder.BLOCK_MAJOR), device=torch.device("cuda"), buffer=memoryview(bytearray(10**5)))
