"""Ranks in processes of one machine or several, over gloo: TCP, which authenticates nobody."""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from pdserve.core.errors import EngineDied

_c10d: Any = distributed
"""Without the type stubs of torch, which leave most of it out."""


class GlooRanks:
    """Implements ParallelContext. A collective whose peers are gone, or silent for `timeout` seconds, raises
    EngineDied.

    store is the c10d store where the ranks find each other, address where the others reach this one. Creation returns
    when all have come.
    """

    def __init__(self, store: Any, rank: int, world_size: int, address: str, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        options = _c10d.ProcessGroupGloo._Options()
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout)
        try:
            self._group = _c10d.ProcessGroupGloo(store, rank, world_size, options)
        except RuntimeError as error:
            raise EngineDied(f"rank {rank} did not meet the other ranks within {timeout:g} s") from error

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Two parts have one sum, whoever adds them; of more, the order of summation matters, and gloo's depends
        on an element's place. Those are gathered and added in the order of ranks."""
        partial = partial.contiguous()
        try:
            if self.world_size == 2:
                self._group.allreduce([partial]).wait()
                return partial
            parts = [torch.empty_like(partial) for _ in range(self.world_size)]
            self._group.allgather([parts], [partial]).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(partial.dtype)

    def broadcast(self, tensor: Tensor) -> Tensor:
        try:
            self._group.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return tensor

    def _lost(self, error: RuntimeError) -> EngineDied:
        first_line = str(error).partition("\n")[0]
        return EngineDied(f"rank {self.rank} lost the other ranks: {first_line}")


def meeting_place(at: tuple[str, int], listener: int | None, world_size: int, timeout: float) -> Any:
    """The c10d store at host and port. listener, rank 0's alone, is the listening socket's descriptor, which the store
    takes over. Raises torch's RuntimeError when nobody is there within timeout seconds."""
    host, port = at
    return _c10d.TCPStore(
        host,
        port,
        world_size=world_size,
        is_master=listener is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
        **({} if listener is None else {"master_listen_fd": listener}),
    )
