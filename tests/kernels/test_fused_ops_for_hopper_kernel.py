"""The kernels around attention compiled for Hopper as they would be launched: they fit, and nothing spills."""

from collections.abc import Mapping
from typing import Any

import pytest

from pdserve_kernels.fused_norm import kernel as fused_norm
from pdserve_kernels.rope_kv_write import kernel as rope_kv_write
from pdserve_kernels.sampling import kernel as sampling
from pdserve_kernels.silu_mul import kernel as silu_mul
from pdserve_kernels.small_gemm import kernel as small_gemm
from pdserve_kernels.small_gemm.tiling import tiling
from tests.kernels.hopper import SHARED_BYTES, Build, compile_for_hopper

BF16, F32, F64, I64, I32 = "*bf16:16", "*fp32:16", "*fp64:16", "*i64:16", "*i32:16"
SOURCE = {
    "logits_ptr": F32,
    "knobs_ptr": F32,
    "controls_ptr": I64,
    "history_ptr": I32,
    "allowed_ptr": I32,
    "banned_ptr": I32,
    "best_ptr": F64,
    "winner_ptr": I64,
    "peak_ptr": F32,
    "log_sum_ptr": F32,
    "vocab": "i32",
    "banned_width": "i32",
}
LAYERS = {
    "Llama-3.1-8B": (4096, 6144, 14336),
    "Qwen3-8B": (4096, 6144, 12288),
    "Qwen3-0.6B": (1024, 4096, 3072),
}
"""Hidden size, width of the qkv projection, width of the MLP."""
HEADS = {"Llama-3.1-8B": 32, "Qwen3-8B": 32, "Qwen3-0.6B": 16}
"""Query heads, of 128 elements."""
ROWS = (8, 32, 64, 256)
"""One for each height of a tile: buckets between them launch the same kernels, unless their splits differ."""
BUILDS_AT_ONCE = 24


def norm(width: int, *, delta: bool) -> Build:
    block = 1 << (width - 1).bit_length()
    pointers = dict.fromkeys(("x_ptr", "delta_ptr", "weight_ptr", "normed_ptr"), BF16)
    return Build(
        module=fused_norm.__name__,
        kernel="add_norm_kernel",
        signature=pointers | {"width": "i32:16", "eps": "fp32"},
        constants={"HAS_DELTA": delta, "BLOCK": block},
        num_warps=fused_norm.num_warps(block),
    )


def rope(dim: int, *, norm: bool) -> Build:
    tensors = dict.fromkeys(("qkv_ptr", "query_weight_ptr", "key_weight_ptr", "q_ptr", "kv_ptr"), BF16)
    places = {"position_ptr": I64, "slot_ptr": I64, "cos_ptr": F32, "sin_ptr": F32}
    strides = dict.fromkeys(("block_stride", "kind_stride", "head_stride", "slot_stride"), "i64:16")
    return Build(
        module=rope_kv_write.__name__,
        kernel="rope_kv_write_kernel",
        signature=tensors
        | places
        | strides
        | {"heads": "i32", "kv_heads": "i32", "block_size": "i32:16", "eps": "fp32"},
        constants={
            "DIM": dim,
            "HALF_BLOCK": 1 << (dim // 2 - 1).bit_length(),
            "HEADS": rope_kv_write.HEADS_PER_PROGRAM,
            "NORM": norm,
        },
        num_warps=rope_kv_write.num_warps(dim),
    )


def gemm(rows: int, columns: int, depth: int, **parts: bool) -> Build:
    cut = tiling(rows, columns, depth, gated="GATED" in parts, deterministic=parts.pop("deterministic", False))
    tensors = ("x_ptr", "weight_ptr", "bias_ptr", "norm_ptr", "residual_ptr", "out_ptr")
    constants: Mapping[str, Any] = {
        "SPLITS": cut.splits,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
        "UPCAST": False,
    }
    return Build(
        module=small_gemm.__name__,
        kernel="small_gemm_kernel",
        signature=dict.fromkeys(tensors, BF16)
        | {"parts_ptr": F32, "squares_ptr": F32, "arrived_ptr": I32, "rows": "i32"}
        | {"columns": "i32:16", "depth": "i32:16", "eps": "fp32"},
        constants={"BIAS": False, "NORM": False, "GATED": False, "RESIDUAL": False, **constants, **parts},
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )


def layer(model: str, rows: int, *, deterministic: bool = False) -> list[Build]:
    """The products of a layer. Of Qwen3-0.6B's, the output projection is wider inside than out."""
    hidden, qkv, mlp = LAYERS[model]
    fixed = {"deterministic": deterministic}
    return [
        gemm(rows, qkv, hidden, NORM=True, **fixed),
        gemm(rows, hidden, HEADS[model] * 128, RESIDUAL=True, **fixed),
        gemm(rows, mlp, hidden, NORM=True, GATED=True, **fixed),
        gemm(rows, hidden, mlp, RESIDUAL=True, **fixed),
    ]


def sampling_builds(logits: str) -> list[Build]:
    """Recorded steps sample logits as the head leaves them, the others float32."""
    tile = {"TILE": sampling.TILE, "SPLIT_TILES": sampling.SPLIT_TILES}
    source = SOURCE | {"logits_ptr": logits}
    scan = Build(module=sampling.__name__, kernel="scan_kernel", signature=source, constants=tile)
    choose = Build(
        module=sampling.__name__,
        kernel="choose_kernel",
        signature=source | {"tokens_ptr": I64, "logprobs_ptr": F32, "splits": "i32"},
        constants={"SPLITS": 32, "TILE": sampling.CHOOSE_TILE},
        num_warps=sampling.CHOOSE_WARPS,
    )
    return [scan, choose]


def elementwise(widths: tuple[int, ...], dims: tuple[int, ...]) -> list[Build]:
    silu = Build(
        module=silu_mul.__name__,
        kernel="silu_mul_kernel",
        signature={"gate_up_ptr": BF16, "out_ptr": BF16, "width": "i32:16"},
        constants={"TILE": silu_mul.TILE},
    )
    norms = [norm(width, delta=delta) for width in widths for delta in (True, False)]
    return [silu, *norms, *(rope(dim, norm=norm) for dim in dims for norm in (True, False))]


def assert_all_fit(builds: list[Build]) -> None:
    for build, built in zip(builds, compile_for_hopper(*builds), strict=True):
        assert built.stack == 0, f"{build} spills"
        assert built.shared <= SHARED_BYTES, build
        if build.kernel == "small_gemm_kernel":
            assert "cp.async" in built.ptx, "weights come while the step before is multiplied"
            instruction = "wgmma.mma_async" if build.constants["BLOCK_M"] >= 64 else "mma.sync"
            assert instruction in built.ptx, build


def test_what_a_decode_step_launches_fits() -> None:
    assert_all_fit([*elementwise((4096,), (128,)), *sampling_builds(BF16), *layer("Llama-3.1-8B", 1)])


@pytest.mark.slow
def test_every_configuration_fits() -> None:
    products = [build for rows in ROWS for model in LAYERS for build in layer(model, rows)]
    products += [build for model in LAYERS for build in layer(model, 1, deterministic=True)]
    builds = [*products, *sampling_builds(F32), *elementwise((1024, 16384), (64, 96, 256))]
    for first in range(0, len(builds), BUILDS_AT_ONCE):
        assert_all_fit(builds[first : first + BUILDS_AT_ONCE])
