"""What to send and when, decided before the first byte is sent: same seed, same plan.

A workload is synthetic (arrivals × length distributions) or replays a trace. Either way it is a stream of
`PlannedRequest`, free of any text; `prompts` turns a plan into words.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from random import Random

from pdserve_loadgen.arrivals import Arrivals, arrival_times
from pdserve_loadgen.lengths import Lengths
from pdserve_loadgen.traces import TraceEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request, or the first of a conversation.

    at: seconds after the start (open loop); 0 in a closed loop, where a free slot decides.
    input_tokens, output_tokens: lengths of each turn; input is what a turn adds.
    prefix_ids: the prompt starts with these blocks of block_tokens tokens; equal ids, equal text.
    cancel_after: the client hangs up after this many pieces of the answer (0: once it is accepted).
    """

    index: int
    at: float
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    block_tokens: int = 1
    turns: int = 1
    cancel_after: int | None = None
    warmup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """Lengths by distribution. rate None is a closed loop.

    prefix_tokens: every prompt starts with one of prefix_groups shared prefixes of this length, which counts
    as input. Lengths and arrivals are drawn from separate generators, so that changing one leaves the other.
    """

    input: Lengths
    output: Lengths
    rate: float | None = None
    arrivals: Arrivals = Arrivals.POISSON
    prefix_tokens: int = 0
    prefix_groups: int = 1
    turns: int = 1

    def plan(self, seed: int) -> Iterator[PlannedRequest]:
        """Without end."""
        lengths, groups = Random(f"{seed} lengths"), Random(f"{seed} groups")
        times = arrival_times(self.arrivals, self.rate, Random(f"{seed} arrivals")) if self.rate else repeat(0.0)
        for index, at in enumerate(times):
            input_tokens, output_tokens = self.input.draw(lengths), self.output.draw(lengths)
            yield PlannedRequest(
                index=index,
                at=at,
                input_tokens=max(input_tokens, self.prefix_tokens),
                output_tokens=output_tokens,
                prefix_ids=(groups.randrange(self.prefix_groups),) if self.prefix_tokens else (),
                block_tokens=self.prefix_tokens or 1,
                turns=self.turns,
            )


def replay(entries: Iterable[TraceEntry]) -> Iterator[PlannedRequest]:
    """A trace's own arrivals, lengths and prefixes."""
    for index, entry in enumerate(entries):
        yield PlannedRequest(
            index=index,
            at=entry.at,
            input_tokens=entry.input_tokens,
            output_tokens=entry.output_tokens,
            prefix_ids=entry.hash_ids,
            block_tokens=entry.block_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a plan ends and what is done to it.

    duration: seconds of arrivals (open loop); requests: of the measured ones. warmup: this many more requests
    come first and are not measured. cancel_fraction: share of requests the client abandons midway.
    """

    requests: int | None = None
    duration: float | None = None
    warmup: int = 0
    cancel_fraction: float = 0.0


def limited(plan: Iterable[PlannedRequest], limits: Limits, seed: int) -> Iterator[PlannedRequest]:
    """The part of a plan that is sent, with its warm-up marked and its cancellations drawn."""
    cancels = Random(f"{seed} cancels")
    count = None if limits.requests is None else limits.requests + limits.warmup
    for planned in islice(plan, count):
        if limits.duration is not None and planned.at >= limits.duration:
            return
        abandoned, share = cancels.random() < limits.cancel_fraction, cancels.random()
        warmup = planned.index < limits.warmup
        cancel_after = int(share * planned.output_tokens) if abandoned and not warmup else None
        yield replace(planned, cancel_after=cancel_after, warmup=warmup)


def offered_rate(plan: Sequence[PlannedRequest]) -> float | None:
    """Requests per second of a finite plan; None when it has no extent in time."""
    extent = plan[-1].at - plan[0].at if plan else 0.0
    return (len(plan) - 1) / extent if extent > 0 else None
