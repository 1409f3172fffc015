"""A two-sided pair between two machines that stop hearing each other while nothing is read: neither keeps it."""

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pdserve.transfer.memory import HostMemory
from pdserve.transfer.pair_control import ControlLine
from pdserve.transfer.pair_server import PairServer
from pdserve.transfer.two_sided import TwoSidedBackend
from tests.namespaces import Hosts, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(60),
]
NOTICED_WITHIN = 8.0
"""Four seconds of silence, and a busy machine's delay."""

_CLONE_NEWNET = 0x40000000


@contextmanager
def living_on(hosts: Hosts, name: str) -> Iterator[Executor]:
    """A thread whose network is the host's, as is that of every thread it starts."""
    with ThreadPoolExecutor(1, initializer=_enter, initargs=(f"/run/netns/{hosts.prefix}{name}",)) as thread:
        yield thread


def _enter(network: str) -> None:
    libc, file = ctypes.CDLL(None, use_errno=True), os.open(network, os.O_RDONLY)
    if libc.setns(file, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"no way into {network}")
    os.close(file)


@contextmanager
def backend_on(thread: Executor, address: str, epoch: int) -> Iterator[TwoSidedBackend]:
    memory, backend = HostMemory(1 << 16), TwoSidedBackend("gloo", address, epoch)
    thread.submit(backend.register, memory).result()
    yield backend
    thread.submit(backend.close).result()
    memory.close()


def test_both_ends_give_up_a_pair_whose_other_machine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    source_gave_up, target_gave_up = threading.Event(), threading.Event()
    serve = PairServer._serve

    def served(server: PairServer, line: ControlLine) -> None:
        serve(server, line)
        source_gave_up.set()

    monkeypatch.setattr(PairServer, "_serve", served)
    with (
        Hosts(("source", "target")) as hosts,
        living_on(hosts, "source") as there,
        living_on(hosts, "target") as here,
        backend_on(there, hosts.address("source"), 1) as source,
        backend_on(here, hosts.address("target"), 2) as target,
    ):
        here.submit(target.connect, "source", source.metadata()).result().result(30)
        pair = target._peers["source"].pair
        assert pair is not None
        pair.when_ended(target_gave_up.set)
        with hosts.cut(("source", "target"), ("target", "source")):
            assert source_gave_up.wait(NOTICED_WITHIN)
            assert target_gave_up.wait(NOTICED_WITHIN)
