"""How one rank of a model reaches the others."""

from typing import Protocol

from torch import Tensor


class ParallelContext(Protocol):
    """The ranks that compute one model together; layers obtain every collective from here.

    All ranks call the same collectives in the same order.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum of all ranks' partial results, of the same shape; may reuse the argument's memory.

        An element's bits depend on that element's parts alone, not on where it stands in the tensor, and are the
        same on every rank."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, of the argument's shape and dtype; may reuse the argument's memory."""
        ...


class SingleRank:
    """A model that lies on one device as a whole."""

    rank = 0
    world_size = 1

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor
