"""Transfer backends by name."""

from pdserve.core.errors import ConfigError
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.nixl import NixlBackend
from pdserve.transfer.shared_memory import SharedMemoryBackend

BACKEND_NAMES = (NixlBackend.name, SharedMemoryBackend.name, LoopbackBackend.name)


def make_backends(names: tuple[str, ...], engine_id: str, epoch: int) -> tuple[TransferBackend, ...]:
    """Backends in order of preference, for LocalTransferService.open. Raises ConfigError for a bad name."""
    if len(set(names)) != len(names):
        raise ConfigError(f"name each transfer backend once, not {', '.join(names)}")
    return tuple(_make(name, engine_id, epoch) for name in names)


def _make(name: str, engine_id: str, epoch: int) -> TransferBackend:
    match name:
        case NixlBackend.name:
            return NixlBackend(f"{engine_id}/{epoch:016x}")
        case SharedMemoryBackend.name:
            return SharedMemoryBackend()
        case LoopbackBackend.name:
            return LoopbackBackend()
        case _:
            raise ConfigError(f"no transfer backend is named {name!r}; there are {', '.join(BACKEND_NAMES)}")
