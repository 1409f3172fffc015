"""pdserve: disaggregated LLM serving. See docs/architecture.md for the layers and docs/glossary.md for the words."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdserve.core.request import SamplingParams as SamplingParams
    from pdserve.llm import LLM as LLM
    from pdserve.llm import RequestOutput as RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]

# Here, because grpc reads them when it is first imported, whoever does that.
# It prints every connection a peer closes; our own logs say what matters.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Its event engine hands every message on between threads of its own: a round trip between two processes takes 1.5 times
# as long as over its older pollers.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")


def __getattr__(name: str) -> Any:
    """The offline API loads torch, which the command line and the supervisor must not."""
    if name == "SamplingParams":
        from pdserve.core.request import SamplingParams

        return SamplingParams
    if name in ("LLM", "RequestOutput"):
        from pdserve import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'pdserve' has no attribute {name!r}")
