"""The programs a deployment consists of: `serve` (the parent), `engine` and `gateway` (its children)."""
