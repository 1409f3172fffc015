"""The GPU bench runs, here on torch's host memory; what it checks by itself it checks here, too."""

import json

import pytest
import torch

from benchmarks.gpu import kv
from benchmarks.gpu.kv import MIB, TIER_BLOCKS, measure


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_the_bench_moves_every_byte_and_compares_each_rate_with_a_plain_copy(device: str) -> None:
    result = measure(device, 8 * MIB, 1, block_tokens=(64,))
    assert len(result["nixl_between_processes"]) == 1
    assert len(result["host_tier"]) == len(TIER_BLOCKS)
    parts = [*result["nixl_between_processes"], *result["digest"], *result["host_tier"]]
    assert all(share > 0 for part in parts for share in part["share"].values())


def test_a_part_that_fails_leaves_what_was_measured_before_and_what_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(kv, "tier", broken)
    told: list[str] = []
    result = kv.measure("cpu", MIB, 1, block_tokens=(), tell=lambda result: told.append(json.dumps(result)))
    assert result["digest"][0]["share"]["digest"] > 0
    assert result["host_tier"] == [{"error": "RuntimeError: no such device"}] * len(TIER_BLOCKS)
    assert len(told) == 1 + len(TIER_BLOCKS)
    assert '"share"' in told[0]
