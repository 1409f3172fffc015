"""What a request leaves in the router's picture when it ends early, and which engines go on with it."""

import asyncio

import pytest
from structlog.testing import capture_logs

from pdserve.core.admission import TenantRules
from pdserve.core.errors import EngineDied, InvalidRequest
from pdserve.core.request import FinishReason
from pdserve.dispatch.migration import MigrationRules
from pdserve.dispatch.tenant_limits import LimitReached
from pdserve.scaler.orders import Orders
from tests.clocks import settle
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


async def test_a_gateway_that_starts_while_engines_sleep_is_there_for_the_request_that_wakes_them() -> None:
    bench = Bench(MigrationRules())
    assert not bench.dispatcher.ready
    bench.dispatcher.obey(Orders(patience=300.0))
    assert bench.dispatcher.ready
    await bench.pool.close()


async def test_what_a_tenants_limit_refuses_is_no_demand_for_engines() -> None:
    bench = Bench(MigrationRules(), tenants={"default": TenantRules(requests_per_second=1.0, burst=1)})
    bench.engines("d0")
    await bench.ask("let in")
    await bench.ask("refused")
    with pytest.raises(LimitReached):
        await bench.tasks["refused"]
    assert bench.dispatcher.demand().arrivals == 1
    bench.tasks["let in"].cancel()
    await asyncio.gather(*bench.tasks.values(), return_exceptions=True)
    await bench.pool.close()


async def test_a_prompt_that_is_computed_stays_expected_until_it_is_announced() -> None:
    bench = Bench(MigrationRules())
    bench.engines("d0")
    await bench.ask("r")
    bench.lines["d0"].say("r", 0, 10, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    assert bench.pool.index.num_expected == len(PROMPT) // 4
    await bench.pool.close()


async def test_a_replay_goes_on_where_results_round_alike_and_a_mixture_is_told_once() -> None:
    bench = Bench(MigrationRules())
    bench.engines("d0")
    bench.lines["d0"].hold(1000, numerics="a")
    await bench.ask("r")
    bench.lines["d0"].say("r", 0, 10, 11)
    with capture_logs() as logs:
        bench.engines("d0", "d1", "d2")
        for name, numerics in (("d1", "a"), ("d2", "b")):
            bench.lines[name].hold(1000, numerics)
        await bench.ask("other")
        for _ in range(2):
            for line in bench.lines.values():
                line.report()
                bench.engines("d0", "d1", "d2")
    told = [log for log in logs if log["log_level"] == "error"]
    assert [log["engines"] for log in told] == [{"d0": "a", "d1": "a", "d2": "b"}]
    bench.lines["d0"].fail("r", EngineDied("d0 died"))
    await settle()
    assert [request.id for request, _ in bench.lines["d1"].submitted if request.id.startswith("r")] == ["r~1"]
    bench.lines["d1"].say("r~1", 0, 12, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    assert bench.answers["r"] == [10, 11, 12]
    bench.tasks["other"].cancel()
    await asyncio.gather(bench.tasks["other"], return_exceptions=True)
    await bench.pool.close()
