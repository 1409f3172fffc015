"""pdserve: disaggregated LLM serving. See docs/architecture.md for the layers and docs/glossary.md for the words."""

__version__ = "0.1.0"
