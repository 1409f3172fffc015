"""No process outlives the one it works for."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_EXIT_FAILED = 1


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends.

    More precisely, when the thread ends that started this process. Ends at once if the parent has ended.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(_EXIT_FAILED)
