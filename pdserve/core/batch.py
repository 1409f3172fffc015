"""One engine step's work, as it crosses from the scheduler to the workers, and what comes back.

Everything here is a plain value that can be serialised: the worker may live in another process. What a step makes for
every sequence is a named tuple, which takes a small part of the time a frozen dataclass takes.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class TokenSource(IntEnum):
    """Where a row's input token comes from."""

    KNOWN = 0
    PREVIOUS_STEP = 1
    """The worker takes it from its own output of the step before; the host has not seen it yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInit:
    """State a worker needs to sample for a sequence; sent with the sequence's first sampled row. The defaults draw
    from the distribution as it is.

    seen_token_ids: prompt and already emitted tokens, the history of the repetition penalty. The
    worker extends it by itself with every token it samples afterwards.
    banned_token_ids may not be chosen while fewer than min_tokens tokens have been emitted.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sample_index: int = 0
    logprobs: bool = False
    min_tokens: int = 0
    banned_token_ids: tuple[int, ...] = ()
    prompt_len: int = 0
    seen_token_ids: tuple[int, ...] = ()


class Row(NamedTuple):
    """One sequence's share of a step: tokens at positions [start, start + num_tokens).

    token_ids has num_tokens entries when token_source is KNOWN and is empty for PREVIOUS_STEP (then
    num_tokens is 1). block_ids is the block table: block_ids[i] holds positions
    [i * block_size, (i + 1) * block_size) and covers start + num_tokens positions.
    The token sampled (when sample is set) belongs to position start + num_tokens.
    """

    sequence_id: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    token_source: TokenSource = TokenSource.KNOWN
    sample: bool = False
    sampler: SamplerInit | None = None
    adapter_id: int = 0
    draft_token_ids: tuple[int, ...] = ()
    draft_parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step. Steps are numbered from 0 without gaps; released names sequences whose worker-side
    state (sampler history) is to be dropped before the step."""

    step: int
    rows: tuple[Row, ...]
    released: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class RowOutput(NamedTuple):
    """Tokens a step produced for one sampled row (one token; more with speculation).

    None at all when the row's logits were not finite: whatever were chosen from them would be wrong."""

    sequence_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Result of a step: one entry per row with sample set, in row order."""

    step: int
    rows: tuple[RowOutput, ...]
