"""How much an engine core has to do."""

from dataclasses import dataclass

from pdserve.core.endpoint import BlockCounts
from pdserve.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLoad:
    """waiting includes fetching; backlog_tokens are tokens of prompts, and of preempted sequences, to compute."""

    running: int
    waiting: int
    fetching: int
    backlog_tokens: int
    blocks: BlockCounts


def load_of(scheduler: Scheduler, blocks: BlockCounts) -> CoreLoad:
    """Now."""
    waiting, running = scheduler.waiting, scheduler.running
    queued = sum(len(s.token_ids) for s in waiting if s.ticket is None)
    begun = sum(s.num_pending_tokens for s in running if s.num_pending_tokens > 1)
    return CoreLoad(
        running=len(running),
        waiting=len(waiting) + len(scheduler.fetching),
        fetching=len(scheduler.fetching),
        backlog_tokens=queued + begun,
        blocks=blocks,
    )
