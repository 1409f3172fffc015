"""Transfer backends by name."""

from pdserve.core.errors import ConfigError
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.nixl import NixlBackend
from pdserve.transfer.shared_memory import SharedMemoryBackend
from pdserve.transfer.two_sided import TwoSidedBackend

BACKEND_NAMES = ("nixl", "shared_memory", "gloo", "nccl", "grpc", "loopback")


def make_backends(
    names: tuple[str, ...], engine_id: str, epoch: int, host: str = "127.0.0.1", rank: int = 0
) -> tuple[TransferBackend, ...]:
    """A rank's backends in order of preference, for LocalTransferService.open. Raises ConfigError for a bad name.

    host is the address at which peers reach this machine, for backends that listen.
    """
    if len(set(names)) != len(names):
        raise ConfigError(f"name each transfer backend once, not {', '.join(names)}")
    return tuple(_make(name, f"{engine_id}/{epoch:016x}/{rank}", epoch, host) for name in names)


def _make(name: str, worker_name: str, epoch: int, host: str) -> TransferBackend:
    match name:
        case NixlBackend.name:
            return NixlBackend(worker_name)
        case SharedMemoryBackend.name:
            return SharedMemoryBackend()
        case "gloo" | "nccl":
            return TwoSidedBackend(name, host, epoch)
        case "grpc":
            from pdserve.transfer.grpc_stream import GrpcStreamBackend  # the only one that needs grpc

            return GrpcStreamBackend(host, epoch)
        case LoopbackBackend.name:
            return LoopbackBackend()
        case _:
            raise ConfigError(f"no transfer backend is named {name!r}; there are {', '.join(BACKEND_NAMES)}")
