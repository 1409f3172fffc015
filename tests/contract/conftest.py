"""Fixtures of the transfer suites, parametrised by each module with the kinds of backend it is about;
and of the launchers'."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from pdserve.cluster.launcher import Launcher
from tests.contract.launching_program import open_launcher
from tests.contract.sources import Driver, InChild
from tests.contract.transfer_bench import Bench, Kind


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """Given indirectly; its environment holds for this process as for the source's."""
    chosen: Kind = request.param
    with pytest.MonkeyPatch.context() as patch:
        for name, value in chosen.env.items():
            patch.setenv(name, value)
        yield chosen


@pytest.fixture(scope="module")
def driver(kind: Kind) -> Iterator[Driver]:
    """One host for all tests of a kind that leave it as it was."""
    driver = kind.driver()
    yield driver
    if isinstance(driver, InChild):
        driver.end()


@pytest.fixture
async def bench(kind: Kind, driver: Driver) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        yield Bench(kind, driver, stack)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["process", "ray"])
async def launcher(request: pytest.FixtureRequest) -> AsyncIterator[Launcher]:
    """One Ray session for all tests of a module: it takes seconds to start."""
    async with AsyncExitStack() as held:
        yield await open_launcher(request.param, held)
