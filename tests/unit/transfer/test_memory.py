"""Host memory: mappable by peers of this machine, recognisable, and gone with its last user."""

import fcntl
import os
from pathlib import Path

import msgspec
import pytest

from pdserve.core.errors import ConfigError, TransferFailed, Unsupported
from pdserve.transfer import nixl
from pdserve.transfer.backends import make_backends
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.memory import HEADER_BYTES, HostMemory, MemoryKind
from pdserve.transfer.nixl import NixlBackend
from pdserve.transfer.shared_memory import SharedMemoryBackend


def test_a_host_memory_is_zeroed_writable_and_behind_its_nonce() -> None:
    memory = HostMemory(100)
    assert memory.array.shape == (100,)
    assert not memory.array.any()
    memory.array[:] = 7
    whole = Path(f"/proc/self/fd/{memory.fd}").read_bytes()
    assert whole[:16] == memory.nonce
    assert whole[HEADER_BYTES:] == bytes([7]) * 100
    assert HostMemory(100).nonce != memory.nonce


def test_a_host_memory_cannot_be_resized_under_its_readers() -> None:
    memory = HostMemory(100)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 10)


def test_closing_keeps_the_bytes_alive_for_arrays_over_them() -> None:
    memory = HostMemory(100)
    array = memory.array
    memory.close()
    memory.close()
    array[:] = 3
    assert array.sum() == 300


def test_a_memory_of_another_process_behind_the_same_numbers_is_refused() -> None:
    ours, theirs = SharedMemoryBackend(), SharedMemoryBackend()
    ours.register(HostMemory(100))
    theirs.register(memory := HostMemory(100))
    described = msgspec.msgpack.decode(theirs.metadata(), type=dict[str, object])
    with pytest.raises(TransferFailed, match="another one than described"):
        ours.connect("p", msgspec.msgpack.encode(described | {"nonce": bytes(16)}))
    with pytest.raises(TransferFailed, match="cannot map"):
        ours.connect("p", msgspec.msgpack.encode(described | {"nbytes": 10**9}))
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        assert fcntl.fcntl(unsealed, fcntl.F_GET_SEALS) == 0
        with pytest.raises(TransferFailed, match="not sealed"):
            ours.connect("p", msgspec.msgpack.encode(described | {"fd": unsealed}))
    finally:
        os.close(unsealed)
    last_words = theirs.metadata()
    memory.close()
    with pytest.raises(TransferFailed, match="cannot map"):
        ours.connect("p", last_words)


class DeviceMemory:
    """A memory only a GPU can reach, by its description."""

    kind, address, nbytes, device_id = MemoryKind.CUDA, 1 << 40, 4096, 0


@pytest.mark.parametrize("backend", [SharedMemoryBackend(), LoopbackBackend()], ids=lambda backend: backend.name)
def test_backends_that_copy_in_host_memory_refuse_device_memory(backend: TransferBackend) -> None:
    with pytest.raises(Unsupported, match="use nixl"):
        backend.register(DeviceMemory())  # type: ignore[arg-type]


def test_without_the_nixl_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_PACKAGES", ("nixl_of_no_cuda",))
    with pytest.raises(ConfigError, match=r"pdserve\[nixl\].*shared_memory"):
        NixlBackend("d").register(HostMemory(100))


def test_backends_are_made_by_name_in_order() -> None:
    assert [b.name for b in make_backends(("shared_memory", "nixl", "loopback"), "d", 1)] == [
        "shared_memory",
        "nixl",
        "loopback",
    ]
    assert make_backends((), "d", 1) == ()
    for names in (("nixl", "nixl"), ("pigeon",)):
        with pytest.raises(ConfigError, match="transfer backend"):
            make_backends(names, "d", 1)
