"""What of the GPU suite can be collected here."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("nixl_cu13") and find_spec("pytest_asyncio") else ["test_kv_transfer.py"]
