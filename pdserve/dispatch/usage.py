"""What a request took of the cluster, from its record, and what that is in seconds of one engine."""

from dataclasses import dataclass
from math import ceil

from pdserve.core.admission import Usage
from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.telemetry.record import RequestRecord

_LINK_BYTES_PER_SECOND = 5e9
"""At which bytes between engines are charged, whatever the link: a slow one is no fault of the tenant's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What a request was charged when it was sent. work: seconds of computing uncached_tokens of prompt_tokens.
    block_size and num_blocks: of the engine that decodes, 0 while unknown."""

    work: float
    prompt_tokens: int
    uncached_tokens: int
    block_size: int = 0
    num_blocks: int = 0

    @classmethod
    def of(cls, work: float, ask: RouteAsk, route: Route, state: ClusterState) -> "Foreseen":
        key = route.decode.engine_id, route.decode.epoch
        capacity = next((view.capacity for view in state.engines if view.key == key), None)
        return cls(
            work=work,
            prompt_tokens=ask.prompt_tokens,
            uncached_tokens=route.uncached_tokens,
            block_size=capacity.block_size if capacity else 0,
            num_blocks=capacity.num_blocks if capacity else 0,
        )


def usage_of(record: RequestRecord, foreseen: Foreseen, output_tokens: int, ended: float) -> Usage:
    """Of a request that ends at a Unix time. A prompt that was not computed to its end counts as foreseen."""
    times = dict(record.stamps)
    sent, first = times.get("routed", ended), times.get("first_token", ended)
    blocks = ceil(foreseen.prompt_tokens / foreseen.block_size) if foreseen.block_size else 0
    grown = output_tokens / foreseen.block_size if foreseen.block_size else 0.0
    # An answer grows evenly, so on average half of it is held.
    held = blocks * max(0.0, ended - sent) + grown / 2 * max(0.0, ended - first)
    trace = record.prompt_trace
    # A replay's prompt is longer, and more of it than of the one that was foreseen may have been cached.
    share = 1.0
    if trace:
        share = max(0, foreseen.prompt_tokens - trace.cached_tokens) / max(1, foreseen.uncached_tokens)
    fetched = trace.fetch.num_bytes if trace and trace.fetch else 0
    handed_over = record.decode_trace.transfer_bytes if record.decode_trace else 0
    moved = sum(move.trace.transfer_bytes for move in record.migrations if move.trace)
    return Usage(prefill_seconds=foreseen.work * share, kv_block_seconds=held, link_bytes=fetched + handed_over + moved)


def engine_seconds(usage: Usage, num_blocks: int) -> float:
    """All of it as seconds of one engine: KV by the share of an engine's blocks that was held."""
    memory = usage.kv_block_seconds / num_blocks if num_blocks else 0.0
    return usage.prefill_seconds + memory + usage.link_bytes / _LINK_BYTES_PER_SECOND
