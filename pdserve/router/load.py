"""What an engine is loaded with now: its last snapshot carried forward, plus what was booked since."""

from math import ceil

from pdserve.core.cluster import EngineView, StepModel
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


def seconds_per_prompt_token(view: EngineView) -> float:
    """Of full prefill steps."""
    return view.step_model.base / tokens_per_step(view.capacity) + view.step_model.per_token


def backlog_tokens(view: EngineView, now: float) -> float:
    """Prompt tokens ahead: those of the snapshot, less what the engine has had time for since, and those
    booked too late for the snapshot to count."""
    if view.load is None:
        return view.booked.prompt_tokens
    computed = max(0.0, now - view.load_at) / seconds_per_prompt_token(view)
    return max(0.0, view.load.backlog_tokens - computed) + view.booked.unseen_tokens


def requests(view: EngineView) -> int:
    """Requests that run or wait there, of this gateway and of others."""
    return view.booked.decoding + view.booked.prefilling + view.others_requests


def context_tokens(view: EngineView, mean: float) -> float:
    """KV its decode steps read; requests of other gateways count as `mean` tokens each."""
    return view.booked.context_tokens + view.others_requests * mean


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


def prompt_seconds(model: StepModel, capacity: EngineCapacity | None, prompt_tokens: int, cached_tokens: int) -> float:
    """To compute a prompt from cached_tokens on, alone, in steps as large as the engine allows."""
    step = tokens_per_step(capacity)
    uncached = prompt_tokens - cached_tokens
    read = (prompt_tokens**2 - cached_tokens**2) / (2 * step)
    return model.base * ceil(uncached / step) + model.per_token * uncached + model.per_context * read
