"""TCP lines whose other end may lose power: a machine that is gone closes nothing."""

import socket

_KEEPALIVE = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 4000}
"""The kernel finds out within four seconds, whether the line is idle or not."""


def keep_watch(line: socket.socket) -> None:
    """Answers go out at once, and the other machine's end is noticed on an idle line, too."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in _KEEPALIVE.items():
        line.setsockopt(socket.IPPROTO_TCP, option, value)
