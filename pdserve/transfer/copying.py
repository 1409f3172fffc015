"""Copying spans between two memories of this machine, for the backends that need no wire."""

from pdserve.core.errors import TransferFailed
from pdserve.transfer.base import ReadPlan, TransferState
from pdserve.transfer.host_spans import Bytes, copy_and_digest_spans, copy_spans


class Copied:
    """A transfer whose copy happened while it was posted."""

    error = ""

    def poll(self) -> TransferState:
        return TransferState.DONE

    def cancel(self) -> None:
        """It is over already."""


def copy_plan(remote: Bytes, local: Bytes, plan: ReadPlan) -> Copied:
    """Copy every span of the plan. Raises TransferFailed, before the first byte, when one is out of range."""
    try:
        if plan.digest is None:
            copy_spans(remote, local, plan.remote, plan.local, plan.lengths)
        else:
            [plan.digest.value], plan.digest.seconds = copy_and_digest_spans(
                remote, local, plan.remote, plan.local, plan.lengths, [plan.digest.seed]
            )
    except ValueError as error:
        raise TransferFailed(str(error)) from error
    return Copied()
