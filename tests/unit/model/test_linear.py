"""The linear methods: all right, and TiledLinear and PackedLinear blind to the rest of the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.model.linear import ROW_TILE, Linear, LinearMethod, PlainLinear, TiledLinear, pad_rows
from pdserve.model.packed_linear import ROW_SIZES, PackedLinear, can_pack

SHAPES = [(64, 128), (88, 100), (256, 1536), (768, 256), (1024, 301)]
DTYPES = [torch.float32, torch.bfloat16]


METHODS = [PlainLinear, TiledLinear, PackedLinear]


def layer(
    method: LinearMethod, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = False
) -> Linear:
    """Packed if its method packs."""
    if isinstance(method, PackedLinear) and not can_pack(dtype):
        pytest.skip("oneDNN packs no such weights here")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    added = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    made = Linear(weight, added, method, kept=True)
    if isinstance(method, PackedLinear):
        method.pack([made])
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_linear_is_x_times_weight_plus_bias(method: type[LinearMethod], bias: bool) -> None:
    plain = layer(PlainLinear(), 64, 48, torch.float32, bias=bias)
    linear = layer(method(), 64, 48, torch.float32, bias=bias)
    x = torch.randn(linear.method.padded(5 * ROW_TILE), 64, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ plain.weight.double().t()
    if plain.bias is not None:
        expected += plain.bias.double()
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", [TiledLinear, PackedLinear])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_a_row_gets_the_same_bits_at_every_place_in_any_company(
    in_features: int, out_features: int, dtype: torch.dtype, method: type[LinearMethod]
) -> None:
    linear = layer(method(), in_features, out_features, dtype, bias=True)
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(in_features, generator=generator).to(dtype)
    results = []
    for rows in (1, 2, 3, 5, 9, 17, 33, 64, 70, 130):
        for place in {0, rows // 2, rows - 1}:
            x = torch.randn(rows, in_features, generator=generator).to(dtype)
            x[place] = row
            results.append(linear(pad_rows(x, linear.method.padded(rows)))[place])
    assert all(torch.equal(result, results[0]) for result in results)


def test_packing_replaces_the_weight() -> None:
    linear = layer(PackedLinear(), 64, 48, torch.float32)
    assert linear.packed is not None
    assert linear.weight.numel() == 0


@given(rows=st.integers(1, 300))
def test_packed_rows_are_padded_to_whole_pieces_and_one_of_the_sizes(rows: int) -> None:
    method = PackedLinear()
    method.pack([layer(PlainLinear(), 8, 8, torch.float32)])
    padded = method.padded(rows)
    assert rows <= padded
    assert padded % ROW_SIZES[-1] in (0, *ROW_SIZES)
    assert method.padded(padded) == padded
    assert method.padded(0) == 0


@given(rows=st.integers(0, 40))
def test_padding_appends_zero_rows(rows: int) -> None:
    x = torch.ones(rows, 3)
    padded = pad_rows(x, TiledLinear().padded(rows))
    assert padded.shape[0] % ROW_TILE == 0
    assert padded.shape[0] - rows < ROW_TILE
    assert torch.equal(padded[:rows], x)
    assert not padded[rows:].any()
