"""What an engine is loaded with now: its last snapshot carried forward, plus what was booked since."""

from math import ceil, inf
from typing import NamedTuple

from pdserve.core.cluster import RECENT_SECONDS, EngineView, StepModel
from pdserve.core.endpoint import EngineCapacity

_DEFAULT_TOKENS_PER_STEP = 512
_DEFAULT_MAX_ROWS = 32


def tokens_per_step(capacity: EngineCapacity | None) -> int:
    return capacity.max_tokens_per_step if capacity else _DEFAULT_TOKENS_PER_STEP


def max_rows(view: EngineView) -> int:
    return view.capacity.max_rows if view.capacity else _DEFAULT_MAX_ROWS


def kv_tokens(view: EngineView) -> int | None:
    """Tokens its KV memory holds; None until the engine has told."""
    return view.capacity.num_blocks * view.capacity.block_size if view.capacity else None


def max_len(view: EngineView) -> float:
    """Most tokens, prompt and output together, a sequence can have there; inf until the engine has told."""
    capacity = view.capacity
    if capacity is None:
        return inf
    held = capacity.num_blocks * capacity.block_size
    return min(held, capacity.max_len) if capacity.max_len else held


def seconds_per_prompt_token(view: EngineView) -> float:
    """Of full prefill steps."""
    return view.step_model.base / tokens_per_step(view.capacity) + view.step_model.per_token


def backlog_tokens(view: EngineView, now: float) -> float:
    """Prompt tokens ahead: those of the snapshot and those booked too late for it to count, less what the engine
    has had time for since; one after the other (Lindley 1952), so that time in which it had none counts for none.

    However slow it is: prompts behind one that has no first token yet are all ahead."""
    if view.load is None:
        return view.booked.prompt_tokens
    return max(float(view.booked.behind_tokens), (busy_until(view) - now) / seconds_per_prompt_token(view))


def busy_until(view: EngineView) -> float:
    """When (monotonic seconds) it will have had time for the prompts ahead; -inf before it has told its load."""
    if view.load is None:
        return -inf
    per_token = seconds_per_prompt_token(view)
    until = view.load_at + view.load.backlog_tokens * per_token
    for tokens, since in view.booked.unseen:
        until = max(until, since) + tokens * per_token
    return until


def requests(view: EngineView) -> int:
    """Requests that run or wait there, of this gateway and of others."""
    return len(view.booked.decoding) + view.booked.prefilling + view.others_requests


def beside(view: EngineView, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
    """(rows, context tokens) of other requests in an average step of one with so long a prompt and answer.

    Those that will have ended before it count for the steps they still take, so a request's last token changes
    little. Requests of other gateways are taken to be like this one."""
    rows = float(view.booked.prefilling + view.others_requests)
    context = float(view.others_requests * prompt_tokens)
    for expected, read in view.booked.decoding:
        share = expected / output_tokens
        if share > 1.0:
            share = 1.0
        rows += share
        context += share * read
    return rows, context


def seconds_amid_prompts(view: EngineView, seconds: float, following: float) -> float:
    """Per token of an answer, in steps that take so many seconds where the engine has no prompts to compute. While it
    has some, a step is full of them and writes one token all the same: for the share of its recent time that it was
    given some, and for as long as those take that follow the request. following: that time per token."""
    full = seconds + view.step_model.per_token * tokens_per_step(view.capacity)
    busy = min(1.0, view.recent_work / RECENT_SECONDS)
    usual = 1 / (busy / full + (1 - busy) / seconds)
    return usual + min(full, following) * (1 - usual / full)


def reserved_tokens(view: EngineView) -> int:
    """KV that is occupied or promised to requests that run there."""
    if view.load is None or view.capacity is None:
        return view.booked.reserved_tokens
    blocks = view.load.blocks
    return max(view.booked.reserved_tokens, (blocks.total - blocks.free) * view.capacity.block_size)


def leased_share(view: EngineView) -> float:
    """Share of its blocks it may not touch before a decode engine has fetched them."""
    blocks = view.load.blocks if view.load else None
    return (blocks.leased + blocks.quarantined) / blocks.total if blocks and blocks.total else 0.0


def is_full(view: EngineView, more_tokens: int) -> bool:
    """Whether a request of more_tokens (prompt and expected output) would have to wait for a row or blocks."""
    room = kv_tokens(view)
    return requests(view) >= max_rows(view) or (room is not None and reserved_tokens(view) + more_tokens > room)


class PromptWork(NamedTuple):
    """What computing prompts takes: steps, tokens, and the context read in all steps together."""

    steps: float = 0.0
    tokens: float = 0.0
    context: float = 0.0

    @classmethod
    def of(cls, capacity: EngineCapacity | None, prompt_tokens: int, cached_tokens: int) -> "PromptWork":
        """Of a prompt from cached_tokens on, alone, in steps as large as the engine allows."""
        step = tokens_per_step(capacity)
        uncached = prompt_tokens - cached_tokens
        return cls(ceil(uncached / step), uncached, (prompt_tokens**2 - cached_tokens**2) / (2 * step))

    def seconds(self, model: StepModel) -> float:
        return model.base * self.steps + model.per_token * self.tokens + model.per_context * self.context

    def faded(self, share: float, more: "PromptWork | None" = None) -> "PromptWork":
        """This share of it, and more."""
        steps, tokens, context = more or PromptWork()
        return PromptWork(share * self.steps + steps, share * self.tokens + tokens, share * self.context + context)


def prompt_seconds(model: StepModel, capacity: EngineCapacity | None, prompt_tokens: int, cached_tokens: int) -> float:
    """To compute a prompt from cached_tokens on, alone, in steps as large as the engine allows.

    PromptWork's arithmetic, written out: a decision asks for it dozens of times."""
    step = tokens_per_step(capacity)
    uncached = prompt_tokens - cached_tokens
    context = (prompt_tokens**2 - cached_tokens**2) / (2 * step)
    return model.base * ceil(uncached / step) + model.per_token * uncached + model.per_context * context
