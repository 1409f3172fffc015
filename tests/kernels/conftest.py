"""What of the kernel tests can be collected here."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["test_kv_digest_kernel.py", "test_paged_attention_kernel.py"]
