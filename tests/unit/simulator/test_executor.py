"""The simulated worker: time by its profile, tokens by seed and position."""

import asyncio
from dataclasses import replace
from math import log
from random import Random
from statistics import fmean, stdev

import pytest

from pdserve.core.batch import Batch, Row, SamplerInit, TokenSource
from pdserve.core.errors import EngineDied
from pdserve.simulator.executor import SimExecutor
from pdserve.simulator.profile import StepCost
from pdserve.simulator.virtual_time import VirtualClock, run_virtual

COST = StepCost(base=1.0, per_token=0.1, per_context=0.01, per_pair=0.001, host=0.5)
SAMPLER = SamplerInit(seed=11, prompt_len=4)


def row(start: int, num_tokens: int, *, sequence_id: int = 0, sampler: SamplerInit | None = SAMPLER) -> Row:
    known = num_tokens > 1
    return Row(
        sequence_id=sequence_id,
        start=start,
        num_tokens=num_tokens,
        token_ids=(5,) * num_tokens if known else (),
        block_ids=(0,),
        token_source=TokenSource.KNOWN if known else TokenSource.PREVIOUS_STEP,
        sample=True,
        sampler=sampler,
    )


def batch(step: int, *rows: Row, released: tuple[int, ...] = ()) -> Batch:
    return Batch(step=step, rows=rows, released=released)


def collected(*batches: Batch, cost: StepCost = COST) -> list[tuple[float, dict[int, int]]]:
    """(time, tokens by sequence) of steps that are all submitted at time 0."""

    async def run() -> list[tuple[float, dict[int, int]]]:
        clock = VirtualClock(asyncio.get_running_loop())
        executor = SimExecutor(cost, 1 << 31, clock, Random(1))
        handles = [executor.forward(each) for each in batches]
        seen = []
        for handle in handles:
            executor.sample(handle)
            output = await executor.collect(handle)
            seen.append((clock.monotonic(), {r.sequence_id: r.token_ids[0] for r in output.rows}))
        return seen

    return run_virtual(run())


def test_a_step_takes_what_its_tokens_context_and_pairs_cost() -> None:
    prompt, decode = row(2, 4), row(9, 1, sequence_id=1)
    # 5 tokens; 6 + 10 tokens of context; 4 queries over 2 cached and on average 2 new tokens.
    assert COST.seconds(batch(0, prompt, decode)) == pytest.approx(1 + 0.5 + 0.16 + 0.001 * 4 * (2 + 2))


def test_steps_follow_one_another_and_the_host_hears_of_them_later() -> None:
    (first, _), (second, _) = collected(batch(0, row(0, 4)), batch(1, row(4, 1, sampler=None)))
    one, two = COST.seconds(batch(0, row(0, 4))), COST.seconds(batch(1, row(4, 1)))
    assert first == pytest.approx(one + COST.host)
    assert second == pytest.approx(one + two + COST.host)


def test_steps_vary_by_chance_around_the_same_mean() -> None:
    cost = StepCost(base=1.0, per_token=0.0, per_context=0.0, spread=0.3)
    ends = [at for at, _ in collected(*(batch(n, row(0, 4)) for n in range(2000)), cost=cost)]
    durations = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    assert fmean(durations) == pytest.approx(1.0, abs=0.03)
    assert stdev(map(log, durations)) == pytest.approx(0.3, abs=0.02)


def test_a_token_depends_on_seed_sample_and_position_only() -> None:
    ((_, whole),) = collected(batch(0, row(0, 4)))
    ((_, last_chunk),) = collected(batch(0, row(3, 1, sequence_id=7), row(0, 9, sequence_id=8)))
    assert whole[0] == last_chunk[7] != last_chunk[8]
    for other in (replace(SAMPLER, seed=12), replace(SAMPLER, sample_index=1)):
        ((_, varied),) = collected(batch(0, row(0, 4, sampler=other)))
        assert varied[0] != whole[0]


def test_sampling_without_state_is_an_error_also_after_its_release() -> None:
    with pytest.raises(EngineDied):
        collected(batch(0, row(3, 1, sampler=None)))
    with pytest.raises(EngineDied):
        collected(batch(0, row(0, 4)), batch(1, row(4, 1, sampler=None), released=(0,)))
