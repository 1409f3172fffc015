"""Every attention backend: paged attention against plain attention over contiguous keys and values."""

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from pdserve.attention.base import AttentionBackend, AttentionMetadata
from pdserve.attention.torch_backend import TorchAttention
from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.worker.kv_tensors import KVTensors

HEADS, KV_HEADS, DIM, BLOCKS = 6, 2, 8, 60
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")
LENGTHS = [(40, 40), (1, 33), (5, 21), (1, 1), (16, 64)]
"""(new tokens, tokens in all) of the sequences of a step."""


@dataclass
class Step:
    """A step with its earlier KV in memory, and what dense attention makes of it."""

    metadata: AttentionMetadata
    q: Tensor
    k: Tensor
    v: Tensor
    kv: KVTensors
    expected: Tensor


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last len(q) tokens over all keys, in float64."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / DIM**0.5
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def build(order: KVOrder, block_size: int, poison: float = float("nan")) -> Step:
    """Every place of memory that no sequence has written holds poison."""
    group = KVGroup(num_layers=2, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32")
    layout = KVLayout(group=group, block_size=block_size, num_blocks=BLOCKS, order=order)
    memory = KVTensors(layout, device=torch.device("cpu"))
    memory.memory.view(torch.float32).fill_(poison)
    generator = torch.Generator().manual_seed(0)
    order_of_blocks = torch.randperm(BLOCKS, generator=generator).tolist()
    tables, slots, parts, expected = [], [], [], []
    for new, total in LENGTHS:
        blocks = [order_of_blocks.pop() for _ in range(-(-total // block_size))]
        q, k, v = (torch.randn(total, h, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
        places = [blocks[i // block_size] * block_size + i % block_size for i in range(total)]
        for i, place in enumerate(places[: total - new]):
            memory.layers[1][place // block_size, 0, :, place % block_size] = k[i]
            memory.layers[1][place // block_size, 1, :, place % block_size] = v[i]
        tables.append(blocks + [0] * (BLOCKS - len(blocks)))
        slots += places[total - new :]
        parts.append(tuple(x[total - new :] for x in (q, k, v)))
        expected.append(dense(q[total - new :], k, v))
    query_lens, kv_lens = zip(*LENGTHS, strict=True)
    metadata = AttentionMetadata(
        block_tables=torch.tensor(tables),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0),
        kv_lens=torch.tensor(kv_lens),
        slots=torch.tensor(slots),
        query_lens_host=query_lens,
        kv_lens_host=kv_lens,
    )
    q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
    return Step(metadata, q, k, v, memory, torch.cat(expected))


def make_backend(kind: str, block_size: int, deterministic: bool) -> AttentionBackend:
    device = torch.device("cpu")
    if kind == "torch":
        return TorchAttention(block_size=block_size, dtype=torch.float32, device=device, deterministic=deterministic)
    if kind == "cpu":
        from pdserve.attention.cpu_backend import CpuAttention

        return CpuAttention()
    from pdserve.attention.triton_backend import TritonAttention

    return TritonAttention(
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        block_size=block_size,
        dtype=torch.float32,
        device=device,
        deterministic=deterministic,
    )


@pytest.fixture(params=["torch", pytest.param("cpu", marks=needs_numba), pytest.param("triton", marks=needs_triton)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(step: Step, kind: str, *, deterministic: bool, padding: int = 0) -> Tensor:
    backend = make_backend(kind, step.kv.layout.block_size, deterministic)
    q, k, v = (torch.cat((x, torch.full((padding, *x.shape[1:]), 3.0))) for x in (step.q, step.k, step.v))
    return backend.plan(step.metadata).run(q, k, v, step.kv.layers[1])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("block_size", [4, 16, 24])
@pytest.mark.parametrize("order", list(KVOrder))
def test_paged_attention_equals_dense_attention(
    kind: str, order: KVOrder, block_size: int, deterministic: bool
) -> None:
    step = build(order, block_size)
    torch.testing.assert_close(
        run(step, kind, deterministic=deterministic).double(), step.expected, atol=1e-5, rtol=1e-5
    )


def test_padding_rows_give_zero_and_write_nothing(kind: str) -> None:
    step, padded = build(KVOrder.BLOCK_MAJOR, 16), build(KVOrder.BLOCK_MAJOR, 16)
    plain = run(step, kind, deterministic=True)
    out = run(padded, kind, deterministic=True, padding=1)
    assert torch.equal(out[:-1], plain)
    assert not out[-1].any()
    assert torch.equal(step.kv.memory, padded.kv.memory)


def test_only_the_layer_and_places_of_the_step_are_written(kind: str) -> None:
    step = build(KVOrder.LAYER_MAJOR, 16, poison=7.0)
    before = [layer.clone() for layer in step.kv.layers]
    run(step, kind, deterministic=True)
    assert torch.equal(step.kv.layers[0], before[0])
    changed = (step.kv.layers[1] != before[1]).any(dim=(1, 2, 4)).flatten().nonzero().squeeze(1)
    assert changed.tolist() == sorted(step.metadata.slots.tolist())


def test_what_stands_in_unwritten_places_changes_no_bit(kind: str) -> None:
    clean, dirty = (build(KVOrder.BLOCK_MAJOR, 16, poison=poison) for poison in (0.0, 1e30))
    assert torch.equal(run(clean, kind, deterministic=True), run(dirty, kind, deterministic=True))
