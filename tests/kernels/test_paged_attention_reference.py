"""The float64 reference against torch's own attention over contiguous keys and values."""

import numpy as np
import torch

from tests.kernels.attention_cases import PADDING_ROWS, Shape, make_step


def test_it_is_causal_attention_over_each_sequences_own_tokens() -> None:
    step = make_step(Shape(head_dim=24, group=3, dtype=torch.float64), [(5, 21), (1, 40), (7, 7), (0, 9)])
    expected, at = [], 0
    for (new, total), table in zip(step.lens, step.tables, strict=True):
        place = np.arange(total)
        keys, values = step.kv[table[place // 16], :, :, place % 16].permute(1, 2, 0, 3)
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        attended = torch.nn.functional.scaled_dot_product_attention(
            step.q[at : at + new].transpose(0, 1), keys, values, attn_mask=mask, enable_gqa=True
        )
        expected.append(attended.transpose(0, 1))
        at += new
    assert at == len(step.q) - PADDING_ROWS
    torch.testing.assert_close(torch.from_numpy(step.expected()), torch.cat(expected), atol=1e-12, rtol=1e-12)
