"""KV bookkeeping of one engine: which block holds what, who may touch it, and what may be reused."""
