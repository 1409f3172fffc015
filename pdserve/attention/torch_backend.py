"""Attention by gathering blocks and calling torch's scaled_dot_product_attention; runs on every device."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pdserve.attention.base import AttentionMetadata
from pdserve.attention.tiles import Tile, aligned_tiles, group_tiles, whole_tile


@dataclass(frozen=True, slots=True)
class _Call:
    """One SDPA call over n tiles of equal shape and m sets of gathered KV (m = n, or 1 shared by all).

    queries: (n * rows,) token index of each query row; rows that are not in the step repeat another.
    blocks: (m, blocks) what to gather. stale: indices into the m * blocks * block_size gathered places that no
    token of the sequence occupies. mask: (n, 1, rows, kv_len) added to the scores.
    kept, targets: which of the n * rows results count, and the token each belongs to.
    """

    queries: Tensor
    blocks: Tensor
    stale: Tensor
    mask: Tensor
    kept: Tensor
    targets: Tensor


class TorchAttention:
    """The backend. dtype is that of queries and KV; deterministic chooses the tiles (see tiles.py)."""

    def __init__(self, *, block_size: int, dtype: torch.dtype, device: torch.device, deterministic: bool) -> None:
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._tiles = aligned_tiles if deterministic else whole_tile

    def plan(self, metadata: AttentionMetadata) -> "TorchPlan":
        lengths = zip(metadata.query_lens_host, metadata.kv_lens_host, strict=True)
        tiles = [tile for s, (new, end) in enumerate(lengths) for tile in self._tiles(s, end - new, end)]
        calls = [self._call(group, metadata) for group in group_tiles(tiles)]
        return TorchPlan(metadata.slots, self._block_size, calls)

    def _call(self, tiles: list[Tile], metadata: AttentionMetadata) -> _Call:
        device, rows, kv_len = self._device, tiles[0].rows, tiles[0].kv_len
        sequences = torch.tensor([tile.sequence for tile in tiles], device=device)
        first = torch.tensor([tile.first for tile in tiles], device=device)
        index = first[:, None] + torch.arange(rows, device=device)
        query_start = metadata.query_starts[sequences]
        query_len = metadata.query_starts[sequences + 1] - query_start
        row = index - (metadata.kv_lens[sequences] - query_len)[:, None]
        in_step = ((row >= 0) & (row < query_len[:, None])).flatten()
        queries = (query_start[:, None] + row.clamp(min=0).minimum(query_len[:, None] - 1)).flatten()
        hidden = torch.arange(kv_len, device=device) > index[..., None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=device).masked_fill_(hidden, float("-inf"))
        kept = in_step.nonzero().squeeze(1)
        shared = len(tiles) > 1 and tiles[0].sequence == tiles[1].sequence
        blocks, stale = self._gathered(sequences[:1] if shared else sequences, kv_len, metadata)
        return _Call(queries, blocks, stale, mask.unsqueeze(1), kept, queries[kept])

    def _gathered(self, sequences: Tensor, kv_len: int, metadata: AttentionMetadata) -> tuple[Tensor, Tensor]:
        count = -(-kv_len // self._block_size)
        tables = metadata.block_tables[sequences, :count]
        blocks = tables.new_zeros(len(sequences), count)
        blocks[:, : tables.shape[1]] = tables
        places = torch.arange(count * self._block_size, device=self._device)
        stale = (places >= metadata.kv_lens[sequences, None]).flatten().nonzero().squeeze(1)
        return blocks, stale


class TorchPlan:
    """A step's calls; run for each layer in turn."""

    def __init__(self, slots: Tensor, block_size: int, calls: list[_Call]) -> None:
        self.slots = slots
        self._blocks = slots // block_size
        self._offsets = slots % block_size
        self._calls = calls

    def run(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        tokens = self._blocks.shape[0]
        kv[:, 0][self._blocks, :, self._offsets] = k[:tokens]
        kv[:, 1][self._blocks, :, self._offsets] = v[:tokens]
        return self.attend(q, kv)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for call in self._calls:
            out[call.targets] = _attend(call, q, kv)
        return out


def _attend(call: _Call, q: Tensor, kv: Tensor) -> Tensor:
    """Results of the rows that count, (len(call.kept), heads, head_dim)."""
    tiles, _, rows, kv_len = call.mask.shape
    heads, kv_heads, head_dim = q.shape[1], kv.shape[2], kv.shape[4]
    gathered = kv.permute(1, 2, 0, 3, 4)[:, :, call.blocks].contiguous()
    # Whatever lies in unoccupied places must not reach the sums: 0 * NaN is NaN.
    gathered.view(2, kv_heads, -1, head_dim).index_fill_(2, call.stale, 0)
    keys, values = gathered.flatten(3, 4)[:, :, :, :kv_len].transpose(1, 2)
    attended = scaled_dot_product_attention(
        q[call.queries].view(tiles, rows, heads, head_dim).transpose(1, 2),
        keys.expand(tiles, -1, -1, -1),
        values.expand(tiles, -1, -1, -1),
        attn_mask=call.mask,
        enable_gqa=heads != kv_heads,
    )
    return attended.transpose(1, 2).reshape(tiles * rows, heads, head_dim)[call.kept]
