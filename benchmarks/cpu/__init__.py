"""The engine on a CPU beside others on the same weights."""
