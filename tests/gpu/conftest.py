"""What of the GPU suite can be collected here: the transfers and tiers need packages that `make gpu-wheels` brings."""

from importlib.util import find_spec

CARRIED = ("nixl_cu13", "blake3", "msgspec", "xxhash", "pytest_asyncio")

missing = [name for name in CARRIED if find_spec(name) is None]
collect_ignore = ["test_kv_transfer.py", "test_tiers.py", "test_bench.py"] if missing else []


def pytest_report_header() -> str:
    if missing:
        return f"left out for want of {', '.join(missing)} (make gpu-wheels): {', '.join(collect_ignore)}"
    return "everything can be collected"
