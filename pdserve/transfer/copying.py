"""Copying spans between two arrays of bytes, for the backends that need no wire."""

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import TransferFailed
from pdserve.transfer.base import ReadPlan, TransferState
from pdserve.transfer.spans import spans_fit

PIECE_BYTES = 256 << 10
"""Copied, then digested: what was written lies in the core's own cache then, and both calls do without the GIL."""


class Copied:
    """A transfer whose copy happened while it was posted."""

    error = ""

    def poll(self) -> TransferState:
        return TransferState.DONE

    def cancel(self) -> None:
        """It is over already."""


def copy_spans(remote: NDArray[np.uint8], local: NDArray[np.uint8], plan: ReadPlan) -> Copied:
    """Copy every span of the plan. Raises TransferFailed, before the first byte, when one is out of range."""
    for name, array, offsets in (("source", remote, plan.remote), ("target", local, plan.local)):
        if not spans_fit(array.nbytes, offsets, plan.lengths):
            raise TransferFailed(f"a span reaches beyond the {array.nbytes} bytes of the {name} memory")
    spans = zip(plan.remote.tolist(), plan.local.tolist(), plan.lengths.tolist(), strict=True)
    for source, target, length in spans:
        for begin in range(0, length, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, length)
            piece = local[target + begin : target + end]
            piece[...] = remote[source + begin : source + end]
            if plan.digest is not None:
                plan.digest.update(piece)
    return Copied()
