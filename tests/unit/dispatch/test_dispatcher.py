"""What a request leaves in the router's picture when it ends before its prompt was computed."""

import asyncio

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.dispatch.migration import MigrationRules
from tests.unit.dispatch.test_migration import PROMPT, Bench


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "cancelled"])
async def test_nobody_is_expected_to_hold_a_prompt_that_will_not_be_computed(refused: bool) -> None:
    bench = Bench(MigrationRules())
    bench.engines("d0")
    await bench.ask("r")
    assert bench.pool.index.num_expected == len(PROMPT) // 4
    if refused:
        bench.lines["d0"].fail("r", InvalidRequest("too long", "prompt"))
    else:
        bench.tasks["r"].cancel()
    [outcome] = await asyncio.gather(bench.tasks["r"], return_exceptions=True)
    assert isinstance(outcome, InvalidRequest if refused else asyncio.CancelledError)
    assert bench.pool.index.num_expected == 0
    await bench.pool.close()
