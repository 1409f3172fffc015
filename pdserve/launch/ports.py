"""The gateway's ports, settled before anything is started."""

import errno
import socket
from contextlib import ExitStack

from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError


def settle_ports(config: Config) -> Config:
    """The configuration with a free port in place of each 0, so that a restarted gateway keeps its
    address. Raises ConfigError for a port that is taken, before engines load their models for nothing."""
    with ExitStack() as held:  # both at once, or the second could get the first one's number
        ports = {name: _settle(held, name, config.host, getattr(config, name)) for name in ("port", "grpc_port")}
    return config.model_copy(update=ports)


def _settle(held: ExitStack, name: str, host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{name}: {port} on {host} is in use; stop its owner or choose another port") from None
        raise ConfigError(f"{name}: cannot listen on {host}:{port}: {error.strerror or error}") from None
    settled: int = probe.getsockname()[1]
    return settled
