"""Engines without a network."""

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineLimits, EngineState, Role
from pdserve.core.protocols import Executor, TransferService
from pdserve.engine.engine import Engine
from pdserve.engine.source_link import SourceLink, SourceName
from tests.unit.engine.toy import INFO

ENDPOINT = Endpoint(engine_id="u0", role=Role.UNIFIED, epoch=7, address="127.0.0.1:1", pid=1, state=EngineState.READY)


def make_engine(executor: Executor, transfer: TransferService, clock: Clock) -> Engine:
    def open_link(source: SourceName, on_failure: object) -> SourceLink:
        raise AssertionError("there is nobody to connect to")

    return Engine(
        endpoint=ENDPOINT,
        info=INFO,
        limits=EngineLimits(),
        executor=executor,
        transfer=transfer,
        open_link=open_link,
        times=Times(),
        clock=clock,
    )
