"""What of the GPU suite can be collected here: the transfers and tiers need packages that `make gpu-wheels` brings."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

CARRIED = ("nixl_cu13", "blake3", "msgspec", "xxhash", "pytest_asyncio")

missing = [name for name in CARRIED if find_spec(name) is None]
collect_ignore = ["test_kv_transfer.py", "test_tiers.py", "test_bench.py"] if missing else []


def pytest_report_header() -> str:
    if missing:
        return f"left out for want of {', '.join(missing)} (make gpu-wheels): {', '.join(collect_ignore)}"
    return "everything can be collected"


@pytest.fixture(autouse=True)
def _own_errors() -> Iterator[None]:
    """What a kernel does wrong is told some time after its launch: here, before its test is over. From then on the
    process cannot use the GPU any more, and that is no fault of the tests that follow."""
    if not torch.cuda.is_available():
        yield
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.skip(f"an earlier test ended this process's use of the GPU: {error}")
    yield
    torch.cuda.synchronize()
