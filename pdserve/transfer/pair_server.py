"""The source's side of two-sided transfers: a thread per target, which sends what that target asks for."""

import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from hmac import compare_digest
from typing import TYPE_CHECKING

from pdserve.core.errors import TransferError, TransferFailed
from pdserve.transfer.communicator import PIECE_BYTES, SOURCE, Communicator, GroupKind, staging
from pdserve.transfer.pair_control import Ask, ControlLine, Granted, Hello, Welcome
from pdserve.transfer.spans import SpanCursor, spans_fit

if TYPE_CHECKING:
    from torch import Tensor

GREETING_LIMIT = 5.0
"""Seconds a target may take to introduce itself."""

ACCEPT_PAUSE = 0.1
"""Seconds until the next attempt when accepting failed, as it does while there are too many open files."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admission:
    """Whom a source serves: peers that shook hands with this incarnation."""

    epoch: int
    token: bytes

    def admits(self, hello: Hello) -> bool:
        return hello.epoch == self.epoch and compare_digest(hello.token, self.token)


class PairServer:
    """Listens on host; every pair has its own thread, which ends with either side."""

    def __init__(self, kind: GroupKind, host: str, memory: "Tensor", admission: Admission) -> None:
        self._kind: GroupKind = kind
        self._host, self._memory, self._admission = host, memory, admission
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._lines: set[ControlLine] = set()
        self._closed = False
        threading.Thread(target=self._accept, name=f"kv-{kind}-accept", daemon=True).start()

    def close(self) -> None:
        """Break off all pairs and accept no more."""
        with self._lock:
            self._closed = True
            lines = list(self._lines)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in lines:
            line.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                with self._lock:
                    if self._closed:
                        return
                _log.warning("a %s pair could not be accepted: %s", self._kind, error)
                time.sleep(ACCEPT_PAUSE)
                continue
            line = ControlLine(connection)
            with self._lock:
                self._lines.add(line)
                closed = self._closed
            if closed:
                line.close()
                return
            threading.Thread(target=self._serve, args=(line,), name=f"kv-{self._kind}-serve", daemon=True).start()

    def _serve(self, line: ControlLine) -> None:
        communicator = None
        try:
            line.set_timeout(GREETING_LIMIT)
            if not self._admission.admits(line.receive(Hello)):
                return
            port, store = Communicator.offer(self._host)
            line.send(Welcome(port, PIECE_BYTES))
            communicator = Communicator(self._kind, self._host, SOURCE, store)
            line.set_timeout(None)
            buffers = staging(self._kind, self._memory, PIECE_BYTES)
            while True:
                offsets, lengths = line.receive(Ask).spans()
                if not spans_fit(self._memory.numel(), offsets, lengths):
                    raise TransferFailed(f"the spans asked for do not lie in {self._memory.numel()} bytes of KV memory")
                line.send(Granted())
                self._send(communicator, buffers, SpanCursor(offsets, lengths))
        except (OSError, EOFError):
            pass  # the target is gone, or we are
        except (RuntimeError, TransferError) as error:
            _log.warning("a %s pair is broken off: %s", self._kind, error)
        finally:
            if communicator is not None:
                communicator.abort()
            line.close()
            with self._lock:
                self._lines.discard(line)

    def _send(self, communicator: Communicator, buffers: "tuple[Tensor, Tensor]", cursor: SpanCursor) -> None:
        """Raises RuntimeError when the target does not take the bytes."""
        under_way, turn = None, 0
        while cursor.remaining:
            buffer, end = buffers[turn], 0
            for offset, length in cursor.take(min(len(buffer), cursor.remaining)):
                buffer[end : end + length] = self._memory[offset : offset + length]
                end += length
            if under_way is not None:
                communicator.wait(under_way)
            under_way, turn = communicator.send(buffer[:end]), 1 - turn
        if under_way is not None:
            communicator.wait(under_way)
