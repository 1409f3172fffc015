"""Host memory for blocks: taken whole at once, in huge pages where the system has them, pinned when a GPU uses it."""

import mmap
from contextlib import suppress
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Rows = NDArray[np.uint8]
"""Shape [n, block_bytes]: a block each."""
Slots = NDArray[np.intp]
"""Numbers of rows."""

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def allocate_rows(num_rows: int, block_bytes: int, *, gpu: int | None = None) -> Rows:
    """Rows whose pages are all there; with gpu, the number of a CUDA device, pinned: between them and itself a GPU
    copies beside its steps.

    Raises MemoryError when the system has not so much, or does not let so much be pinned."""
    num_bytes = num_rows * block_bytes
    try:
        memory = mmap.mmap(-1, num_bytes, flags=_FLAGS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of host memory are not to be had") from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[:: mmap.PAGESIZE] = 0
    if gpu is not None:
        _pin(array, gpu)
    return array.reshape(num_rows, block_bytes)


def _pin(array: Bytes, gpu: int) -> None:
    """As long as the array or a view of it lives. Registered, not allocated by torch: its pinned allocator rounds up
    to a power of two. On the device that uses it, for the thread's current one might be another's: registering there
    would take memory of that one for a context."""
    import torch

    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = array.ctypes.data
    with torch.cuda.device(gpu):
        error = int(runtime.cudaHostRegister(address, array.nbytes, 0))
    if error:
        raise MemoryError(f"{array.nbytes} bytes of host memory cannot be pinned (CUDA error {error})")
    # Its addresses may be given to other memory afterwards, which then could not be pinned.
    finalize(array, runtime.cudaHostUnregister, address).atexit = False
