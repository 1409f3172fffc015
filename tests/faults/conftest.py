"""The transfer fixtures of the contract suites, for faults that only a real peer process can have."""

from tests.contract.conftest import bench, driver, kind

__all__ = ["bench", "driver", "kind"]
