"""NIXL over UCX: RDMA, GPUDirect, CMA or TCP, whichever UCX finds between two workers.

What NIXL 1.5 does, and what follows:

* It cannot cancel. A read in flight is polled until it is over (base.py, QUARANTINED).
* It has no deadline: a frozen peer stays "in progress" for ever. The service has its own.
* Over CMA the copy happens inside the call that posts it (the GIL is released), over TCP it does not.
* Its Python front fixes the progress thread's delay to 0, which keeps one core busy in every idle worker.
  With a delay that thread sleeps on UCX's event descriptor instead and loses no speed; the setting
  exists only in the bindings, so these are used directly.
* Over TCP, UCX connects inside the call that makes a peer known and waits there, for minutes where the peer cannot
  be reached, and meanwhile no read of any other peer goes on. It is told not to wait.
* UCX logs to stdout unless told otherwise; it is told.
"""

import importlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from pdserve.core.errors import ConfigError, TransferFailed
from pdserve.core.msgpack import unpack
from pdserve.transfer.base import CONNECTED, Offsets, ReadPlan, TransferState
from pdserve.transfer.memory import KVMemory, MemoryKind

PROGRESS_DELAY_US = 10_000
"""Longest sleep of UCX's progress thread; events wake it earlier."""

_PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl")

_UCX_SETTINGS = {"UCX_LOG_FILE": "stderr", "UCX_TCP_CONN_NB": "y"}
"""For whatever the environment does not set."""

_Word = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class PeerMemory(msgspec.Struct, frozen=True):
    """What connect gets: NIXL's own agent metadata and where the registered bytes lie."""

    agent: bytes
    kind: MemoryKind
    address: _Word
    nbytes: _Word
    device_id: _Word


PEER_MEMORY = msgspec.msgpack.Decoder(PeerMemory)


class NixlTransfer:
    """One READ request of an agent, posted on creation; frees its handle when it is over."""

    def __init__(self, agent: Any, handle: int, nixl: "Bindings") -> None:
        self._agent, self._handle, self._nixl = agent, handle, nixl
        self._state = TransferState.IN_PROGRESS
        self.error = ""
        self._update(lambda: agent.postXferReq(handle, b""))

    def poll(self) -> TransferState:
        if self._state is TransferState.IN_PROGRESS:
            self._update(lambda: self._agent.getXferStatus(self._handle))
        return self._state

    def cancel(self) -> None:
        """NIXL has none: the read goes on to its end."""

    def _update(self, ask: Callable[[], Any]) -> None:
        try:
            if ask() == self._nixl.module.NIXL_IN_PROG:
                return
            self._state = TransferState.DONE
        except self._nixl.errors as error:
            self._state, self.error = TransferState.ERROR, _words(error)
        # Refused, NIXL keeps the handle until the agent ends; the transfer itself is over.
        with suppress(*self._nixl.errors):
            self._agent.releaseXferReq(self._handle)


@dataclass(frozen=True, slots=True)
class Bindings:
    """NIXL's binding module and the exceptions it raises (they share no base class)."""

    module: Any
    errors: tuple[type[Exception], ...]


def load_bindings() -> Bindings:
    """Raises ConfigError when it is not installed."""
    for name, value in _UCX_SETTINGS.items():
        os.environ.setdefault(name, value)
    reasons = []
    for package in _PACKAGES:
        try:
            module = importlib.import_module(f"{package}._bindings")
            found = {name: value for name, value in vars(module).items() if name.startswith("nixl")}
            return Bindings(module, tuple(value for name, value in found.items() if name.endswith("Error")))
        except ImportError as error:
            reasons.append(f"{package}: {error}")
    raise ConfigError(
        "the nixl transfer backend needs the package nixl-cu13: install 'pdserve[nixl]', or choose another "
        f"backend such as shared_memory ({'; '.join(reasons)})"
    )


class NixlBackend:
    """One NIXL agent with its UCX backend. agent_name must be unique among all workers ever connected."""

    name = "nixl"

    def __init__(self, agent_name: str) -> None:
        self._agent_name = agent_name
        self._peers: dict[str, tuple[str, PeerMemory]] = {}
        self._agent: Any = None

    def register(self, memory: KVMemory) -> None:
        self._bindings = load_bindings()
        self._nixl = self._bindings.module
        try:
            self._agent = self._nixl.nixlAgent(self._agent_name, self._config())
            self._ucx = self._agent.createBackend("UCX", {})
            spans = np.array([[memory.address, memory.nbytes, memory.device_id]], dtype=np.uint64)
            self._agent.registerMem(self._nixl.nixlRegDList(self._segment(memory.kind), spans), [self._ucx])
        except self._bindings.errors as error:
            raise ConfigError(f"NIXL cannot start its UCX backend for {memory.kind} memory: {_words(error)}") from error
        self._memory = memory

    def metadata(self) -> bytes:
        memory = self._memory
        return msgspec.msgpack.encode(
            PeerMemory(self._agent.getLocalMD(), memory.kind, memory.address, memory.nbytes, memory.device_id)
        )

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        self.disconnect(peer_id)
        peer = unpack(metadata, PEER_MEMORY)
        try:
            agent_name = self._agent.loadRemoteMD(peer.agent).decode()
            self._peers[peer_id] = (agent_name, peer)
            self._agent.makeConnection(agent_name, [self._ucx])
        except self._bindings.errors as error:
            self.disconnect(peer_id)
            raise TransferFailed(f"NIXL cannot connect to {peer_id}: {_words(error)}") from error
        return CONNECTED

    def post(self, peer_id: str, plan: ReadPlan) -> NixlTransfer:
        if peer_id not in self._peers:
            raise TransferFailed(f"NIXL is not connected to {peer_id}")
        agent_name, peer = self._peers[peer_id]
        ours = self._memory
        local = self._spans(ours.kind, ours.address, ours.device_id, plan.local, plan.lengths)
        remote = self._spans(peer.kind, peer.address, peer.device_id, plan.remote, plan.lengths)
        try:
            handle = self._agent.createXferReq(self._nixl.NIXL_READ, local, remote, agent_name, b"", [self._ucx])
        except self._bindings.errors as error:
            raise TransferFailed(f"NIXL refuses a read from {peer_id}: {_words(error)}") from error
        return NixlTransfer(self._agent, handle, self._bindings)

    def disconnect(self, peer_id: str) -> None:
        known = self._peers.pop(peer_id, None)
        if known is None:
            return
        # A peer whose process is gone may have been dropped by UCX already.
        with suppress(*self._bindings.errors):
            self._agent.invalidateRemoteMD(known[0])

    def close(self) -> None:
        for peer_id in list(self._peers):
            self.disconnect(peer_id)
        # The last reference ends the agent and its progress thread, and with them the registration.
        self._agent = None

    def _config(self) -> Any:
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_DELAY_US
        config.useListenThread = False
        config.lthrDelay = 0
        config.captureTelemetry = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_NONE
        return config

    def _segment(self, kind: MemoryKind) -> Any:
        return self._nixl.VRAM_SEG if kind is MemoryKind.CUDA else self._nixl.DRAM_SEG

    def _spans(self, kind: MemoryKind, base: int, device_id: int, offsets: Offsets, lengths: Offsets) -> Any:
        rows = np.empty((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = offsets + np.uint64(base)
        rows[:, 1] = lengths
        rows[:, 2] = device_id
        return self._nixl.nixlXferDList(self._segment(kind), rows)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
