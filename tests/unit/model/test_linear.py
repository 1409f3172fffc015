"""The two linear methods: both right, and TiledLinear blind to the rest of the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.model.linear import ROW_TILE, Linear, PlainLinear, TiledLinear, pad_rows

SHAPES = [(64, 128), (88, 100), (256, 1536), (768, 256), (1024, 301)]
DTYPES = [torch.float32, torch.bfloat16]


def layer(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = False) -> Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    return Linear(weight, torch.randn(out_features, generator=generator).to(dtype) if bias else None, TiledLinear())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [PlainLinear(), TiledLinear()])
def test_a_linear_is_x_times_weight_plus_bias(method: PlainLinear | TiledLinear, bias: bool) -> None:
    linear = layer(64, 48, torch.float32, bias=bias)
    linear.method = method
    x = torch.randn(3 * ROW_TILE, 64, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ linear.weight.double().t()
    if linear.bias is not None:
        expected += linear.bias.double()
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_a_row_gets_the_same_bits_at_every_place_in_any_company(
    in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    linear = layer(in_features, out_features, dtype, bias=True)
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(in_features, generator=generator).to(dtype)
    results = []
    for place in range(2 * ROW_TILE):
        x = torch.randn(2 * ROW_TILE, in_features, generator=generator).to(dtype)
        x[place] = row
        results.append(linear(x)[place])
    results.append(linear(pad_rows(row[None], ROW_TILE))[0])
    assert all(torch.equal(result, results[0]) for result in results)


@given(rows=st.integers(0, 40), tile=st.sampled_from([1, 16]))
def test_padding_appends_the_fewest_zero_rows(rows: int, tile: int) -> None:
    x = torch.ones(rows, 3)
    padded = pad_rows(x, tile)
    assert padded.shape[0] % tile == 0
    assert padded.shape[0] - rows < tile
    assert torch.equal(padded[:rows], x)
    assert not padded[rows:].any()
