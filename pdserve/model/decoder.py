"""The decoder-only transformer that Llama, Mistral, Qwen2 and Qwen3 share."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.functional import embedding

from pdserve.attention.base import AttentionPlan
from pdserve.model.layers import Build, DecoderLayer
from pdserve.model.linear import Linear, pad_rows
from pdserve.model.ops import Residual
from pdserve.model.rope import Rotary

LayersDone = Callable[[int, int], None]
"""Called as (first, end) once the KV of layers [first, end) of the step is written; on a GPU, once its writing is
submitted to the current stream."""


class Decoder(nn.Module):
    """Token ids and positions in, hidden states and logits out; KV goes to and comes from paged memory.

    Between entry and exit a step has as many rows as its linear method wants for its tokens.

    The embedding is whole on every rank: looking a row up costs nothing, summing parts of it would cost a
    collective. The head is whole and used on rank 0 alone, where tokens are chosen; the others have none.
    """

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        self.config = config
        self.shard = build.shard
        self.method = build.method
        self.embedding = nn.Parameter(build.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        self.rotary = Rotary(config).to(build.device)
        self.layers = nn.ModuleList(DecoderLayer(build) for _ in range(config.num_layers))
        self.norm = build.norm(config.hidden_size)
        self.ops = build.ops
        self.head = self._head(build) if build.parallel.rank == 0 else None

    def _head(self, build: Build) -> Linear:
        config = build.config
        weight = self.embedding if config.tied_head else build.empty(config.vocab_size, config.hidden_size)
        return Linear(weight, None, build.method, kept=True)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        plan: AttentionPlan,
        kv_layers: Sequence[Tensor],
        on_layers_done: LayersDone | None = None,
    ) -> Tensor:
        """token_ids and positions (tokens,) int64 → normed hidden states (tokens, hidden_size).

        kv_layers: per layer (num_blocks, 2, kv_heads, block_size, head_dim), written and read by the plan.
        """
        rows = self.method.padded(token_ids.shape[0])
        residual = Residual(embedding(pad_rows(token_ids, rows), self.embedding))
        rotation = self.ops.rotation(self.rotary, pad_rows(positions, rows))
        for index, layer in enumerate(self.layers):
            residual = layer(residual, rotation, plan, kv_layers[index])
            if on_layers_done is not None:
                on_layers_done(index, index + 1)
        return self.ops.norm(residual, self.norm)[: token_ids.shape[0]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows, hidden_size) → float32 logits (rows, vocab_size). On rank 0 only."""
        assert self.head is not None
        scores: Tensor = self.head(pad_rows(hidden, self.method.padded(hidden.shape[0])))
        return scores[: hidden.shape[0]].float()
