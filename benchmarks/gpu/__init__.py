"""Benchmarks that need a GPU; they run with no more than torch, Triton and NumPy installed."""
