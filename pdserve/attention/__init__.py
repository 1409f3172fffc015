"""Attention over paged KV: the metadata of a step, the backend protocol, and its implementations."""
