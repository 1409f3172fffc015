"""pdserve: disaggregated LLM serving. See docs/architecture.md for the layers and docs/glossary.md for the words."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdserve.core.request import SamplingParams as SamplingParams
    from pdserve.llm import LLM as LLM
    from pdserve.llm import RequestOutput as RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """The offline API loads torch, which the command line and the supervisor must not."""
    if name == "SamplingParams":
        from pdserve.core.request import SamplingParams

        return SamplingParams
    if name in ("LLM", "RequestOutput"):
        from pdserve import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'pdserve' has no attribute {name!r}")
