"""Triton kernels, one package per operation: kernel.py, and reference.py, its meaning in NumPy."""
