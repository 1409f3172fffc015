"""How one rank of a model reaches the others."""

from typing import Protocol

from torch import Tensor


class ParallelContext(Protocol):
    """The ranks that compute one model together; layers obtain every collective from here."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum of all ranks' partial results, of the same shape; may reuse the argument's memory."""
        ...


class SingleRank:
    """A model that lies on one device as a whole."""

    rank = 0
    world_size = 1

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial
