"""The same open-loop load for real deployments and simulated ones: what is asked when, by whom, and what came of it."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from pdserve.core.request import Request, SamplingParams
from pdserve.simulator.report import SimulatedRequest
from pdserve.simulator.workload import Arrival
from pdserve_loadgen.client import Client
from pdserve_loadgen.endpoint import Exchange
from pdserve_loadgen.percentiles import percentile
from pdserve_loadgen.result import Outcome

_UNSHARED = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Mean prompt and answer in tokens; lengths are log-normal with this standard deviation of the logarithm."""

    input: int
    output: int
    spread: float = 0.5
    longest: int = 100_000


@dataclass(frozen=True, slots=True)
class Shot:
    at: float
    tenant: str
    input: int
    output: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request as its client saw it; seconds. error: None for a complete answer."""

    tenant: str
    ttft: float | None
    tpot: float | None
    took: float
    error: str | None

    def meets(self, ttft: float, tpot: float) -> bool:
        return self.error is None and (self.ttft or 0.0) <= ttft and (self.tpot or 0.0) <= tpot

    @property
    def is_refused(self) -> bool:
        return self.error in ("overloaded", "http_429:overloaded")


def shots(shape: Shape, rate: float, seconds: float, seed: int, tenant: str = "default") -> Iterator[Shot]:
    """Poisson arrivals of prompts that share nothing."""
    rng, at, number = Random(f"{seed} {tenant}"), 0.0, 0
    while (at := at + rng.expovariate(rate)) < seconds:
        number += 1
        yield Shot(at, tenant, _draw(rng, shape, shape.input), max(2, _draw(rng, shape, shape.output)), number)


def merged(*plans: Iterable[Shot]) -> list[Shot]:
    return sorted((shot for plan in plans for shot in plan), key=lambda shot: shot.at)


def as_arrivals(plan: Iterable[Shot]) -> Iterator[Arrival]:
    """For the simulator."""
    for shot in plan:
        base = Random(f"{shot.tenant} {shot.number}").randrange(_UNSHARED)
        yield Arrival(
            shot.at,
            Request(
                id=f"{shot.tenant}-{shot.number}",
                prompt_token_ids=tuple(range(base, base + shot.input)),
                sampling=SamplingParams(max_tokens=shot.output, seed=shot.number),
                tenant=shot.tenant,
            ),
        )


def seen_in(simulated: Iterable[SimulatedRequest]) -> list[Seen]:
    return [
        Seen(
            tenant=each.result.id.rpartition("-")[0],
            ttft=each.result.ttft,
            tpot=each.result.tpot,
            took=each.result.finished - each.result.sent,
            error=each.result.error,
        )
        for each in simulated
    ]


@dataclass(slots=True)
class Gun:
    """Sends shots to real endpoints, one client per tenant. words: one token each."""

    clients: Mapping[str, Client]
    words: Sequence[str]
    seen: list[Seen] = field(default_factory=list)

    async def fire(self, plan: Iterable[Shot]) -> list[Seen]:
        """Open loop; returns when all have been answered."""
        texts = [(shot, self._text(shot)) for shot in plan]
        seen: list[Seen] = []
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for shot, text in texts:
                await asyncio.sleep(begun + shot.at - time.perf_counter())
                group.create_task(self._send(shot, text, seen))
        return seen

    async def capacity(self, shape: Shape, seconds: float, at_once: int, seed: int) -> float:
        """Requests per second of a closed loop."""
        plan = list(shots(shape, 1000.0, seconds, seed))
        seen: list[Seen] = []
        begun = time.perf_counter()

        async def loop() -> None:
            while plan and time.perf_counter() - begun < seconds:
                shot = plan.pop()
                await self._send(shot, self._text(shot), seen)

        await asyncio.gather(*(loop() for _ in range(at_once)))
        return sum(each.error is None for each in seen) / (time.perf_counter() - begun)

    async def _send(self, shot: Shot, text: str, seen: list[Seen]) -> None:
        answer = await self.clients[shot.tenant].send(Exchange((text,)), shot.output, f"{shot.tenant}-{shot.number}")
        times = answer.token_times
        later = len(times) - 1
        seen.append(
            Seen(
                tenant=shot.tenant,
                ttft=times[0] - answer.sent if times else None,
                tpot=(times[-1] - times[0]) / later if later > 0 else None,
                took=answer.finished - answer.sent,
                error=None if answer.outcome is Outcome.OK else answer.error or "error",
            )
        )

    def _text(self, shot: Shot) -> str:
        rng = Random(f"{shot.tenant} {shot.number} {shot.at}")
        return " ".join(rng.choices(self.words, k=shot.input))


def p(values: Iterable[float | None], percent: float) -> float | None:
    """A percentile of those that are known."""
    known = sorted(value for value in values if value is not None)
    return percentile(known, percent) if known else None


def _draw(rng: Random, shape: Shape, mean: int) -> int:
    factor = rng.lognormvariate(-(shape.spread**2) / 2, shape.spread)
    return max(1, min(shape.longest, round(mean * factor)))
