"""Every test here computes as a worker's thread does."""

import pytest

from tests.stepping import single_thread


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    single_thread()
