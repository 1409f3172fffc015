"""What decides how results round, besides model, dtype and input: engines alike in this compute the same bits."""

import platform
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from pdserve.attention.arrays import have_cpu_kernels

_VECTOR_FLAGS = ("avx", "amx", "fma", "sse", "asimd", "sve", "sme", "bf16", "fphp")


def numerics(device: torch.device, *, threads: int, ranks: int) -> str:
    """In words, to be compared and read. Those that differ may still round alike; nobody has shown it."""
    where = _gpu(device) if device.type == "cuda" else _cpu(threads)
    return f"{where}, ranks: {ranks}, torch {torch.__version__}"


def _gpu(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, triton {version('triton')}"


def _cpu(threads: int) -> str:
    """Libraries choose their kernels by the processor's vector instructions, and divide sums among threads."""
    kernels = f"numba {version('numba')}" if have_cpu_kernels() else "no numba"
    return f"{platform.machine()} with vector instructions {_vector_instructions()}, threads: {threads}, {kernels}"


def _vector_instructions() -> str:
    """A short name of the set of them that the kernel tells of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    flags = sorted(flag for flag in told.split() if flag.startswith(_VECTOR_FLAGS))
    return sha256(" ".join(flags).encode()).hexdigest()[:8]
