"""A defect of an engine's own is the end of it, and the log has the cause."""

import asyncio
from collections.abc import Sequence

from structlog.testing import capture_logs

from pdserve.core.batch import Batch, StepOutput
from pdserve.core.protocols import StepHandle
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from tests.clocks import ManualClock
from tests.unit.engine.engines import ENDPOINT, make_engine
from tests.unit.engine.toy import make_layout, make_request


class DefectiveExecutor:
    def forward(self, batch: Batch) -> StepHandle:
        raise KeyError("a defect")

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        raise AssertionError("no step has begun")

    async def collect(self, handle: StepHandle) -> StepOutput:
        raise AssertionError("no step has begun")


async def test_what_made_an_engine_fail_internally_is_in_its_log() -> None:
    layout = make_layout(num_blocks=8, block_size=4)
    transfer = await LocalTransferService.open(
        engine_id=ENDPOINT.engine_id,
        epoch=ENDPOINT.epoch,
        layout=layout,
        memory=HostMemory(layout.total_bytes),
        backends=(),
    )
    with capture_logs() as logs:
        async with make_engine(DefectiveExecutor(), transfer, ManualClock()) as engine:
            engine.start(make_request("r", [1, 2, 3]), lambda items: None)
            death = await asyncio.wait_for(engine.death(), 20)
    assert str(death) == f"{ENDPOINT.engine_id} failed internally"
    (told,) = [log for log in logs if log.get("exc_info")]
    assert (told["log_level"], told["engine"]) == ("error", ENDPOINT.engine_id)
    await transfer.close()
