"""core.protocols.Executor without a model: steps take the time a profile says, tokens follow from seed and position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from pdserve.core.batch import Batch, RowOutput, StepOutput
from pdserve.core.clock import Clock
from pdserve.core.errors import EngineDied
from pdserve.core.protocols import StepHandle
from pdserve.simulator.profile import StepCost

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SimStep:
    """A step under way; its core.protocols.StepHandle. collected_at: monotonic seconds."""

    step: int
    collected_at: float
    output: StepOutput


@dataclass(slots=True)
class Work:
    """What an engine has computed so far."""

    steps: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0


@dataclass(slots=True)
class SimExecutor:
    """Computes steps one after the other. A token depends on the request's seed and its position alone, so any
    engine, chunking, batch or replay gives the same answer, and a misplaced position another."""

    cost: StepCost
    vocab_size: int
    clock: Clock
    random: Random
    """What steps that vary are drawn from."""
    work: Work = field(default_factory=Work)
    _idle_at: float = 0.0
    _seeds: dict[int, int] = field(default_factory=dict)
    _under_way: dict[int, SimStep] = field(default_factory=dict)

    def forward(self, batch: Batch) -> SimStep:
        for sequence_id in batch.released:
            self._seeds.pop(sequence_id, None)
        seconds = self.cost.seconds(batch) * self._chance()
        self._idle_at = max(self._idle_at, self.clock.monotonic()) + seconds
        self.work.steps += 1
        self.work.tokens += batch.num_tokens
        self.work.busy_seconds += seconds
        step = SimStep(batch.step, self._idle_at + self.cost.host, self._sampled(batch))
        self._under_way[batch.step] = step
        return step

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        """Tokens are fixed already."""

    async def collect(self, handle: StepHandle) -> StepOutput:
        step = self._under_way.pop(handle.step)
        await self.clock.sleep(max(0.0, step.collected_at - self.clock.monotonic()))
        return step.output

    def _chance(self) -> float:
        spread = self.cost.spread
        return self.random.lognormvariate(-(spread**2) / 2, spread) if spread else 1.0

    def _sampled(self, batch: Batch) -> StepOutput:
        rows = []
        for row in batch.rows:
            if not row.sample:
                continue
            if row.sampler is not None:
                self._seeds[row.sequence_id] = mix(row.sampler.seed, row.sampler.sample_index)
            elif row.sequence_id not in self._seeds:
                raise EngineDied(f"sequence {row.sequence_id} is sampled without its sampler state")
            token = mix(self._seeds[row.sequence_id], row.start + row.num_tokens) % self.vocab_size
            rows.append(RowOutput(sequence_id=row.sequence_id, token_ids=(token,)))
        return StepOutput(step=batch.step, rows=tuple(rows))


def mix(seed: int, number: int) -> int:
    """64 well-mixed bits (splitmix64)."""
    bits = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
